"""Runs a tree of tokens after one prompt: each row sees the prompt and its own ancestors, whose keys and values are kept.

Why: a search over a trie of titles comes back to a node many passes after it has run. With kept keys and values a node costs the
rows of its own tokens, once. It is a cache of transformers whose layers give a pass only the rows that it sees, so that a pass
does not grow with the tree.
Cost: keys and values of all rows, 46 KB a row for SmolLM2-135M in float32 (30 layers, 3 heads of 64 with keys and values), and a
copy of those that a pass sees.

P rows of the prompt, n rows of a pass, S kept rows that it sees, D width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from rec_dist.models.attention import dense_mask, for_layers
from rec_dist.models.attention_paths import embedding_weight, one_of_few
from rec_dist.models.flex import FLEX
from rec_dist.runtime.arrays import I64


class _Pass:
    """What the layers of a cache must know of a pass: which kept rows it sees (S,), and how many of its rows to keep."""

    seen: Tensor
    kept: int


class _TreeLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer: (1, H, capacity, D) with the rows of the tree in front."""

    def __init__(self, now: _Pass) -> None:
        super().__init__()
        self._now, self._rows = now, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps the rows of a pass. Returns the rows that it sees, and behind them its own."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        seen, kept = self._now.seen, self._now.kept
        results = []
        for name, states in (("keys", key_states), ("values", value_states)):
            whole = _with_room(getattr(self, name), self._rows, kept)
            whole[:, :, self._rows : self._rows + kept] = states[:, :, :kept]
            setattr(self, name, whole)
            results.append(torch.cat([whole.index_select(2, seen), states], dim=2) if len(seen) else states)
        self._rows += kept
        return results[0], results[1]


def _with_room(whole: Tensor, rows: int, more: int) -> Tensor:
    if rows + more <= whole.shape[2]:
        return whole
    larger = whole.new_empty(*whole.shape[:2], max(2 * whole.shape[2], rows + more), whole.shape[3])
    larger[:, :, :rows] = whole[:, :, :rows]
    return larger


class TokenTree:
    """A tree that has grown from the prompt `tokens` (P,). base: a causal language model.

    last_hidden: (1, D), the state after the prompt. A model with FlexAttention takes SDPA from now on, whose masks are free.
    """

    def __init__(self, base: Any, tokens: I64) -> None:
        if base.config._attn_implementation == FLEX:
            base.set_attn_implementation("sdpa")
        self._base, self._weight = base, embedding_weight(base)
        self._now = _Pass()
        self._cache = Cache(layer_class_to_replicate=partial(_TreeLayer, self._now))
        self._prompt = len(tokens)
        self._paths: list[I64] = []  # of each row behind the prompt: its ancestors there, and itself
        count = np.arange(len(tokens))
        hidden = self._forward(tokens, count, np.empty(0, dtype=np.int64), count[:, None] >= count, count)
        self.last_hidden = hidden[-1:]

    def __len__(self) -> int:
        return self._prompt + len(self._paths)

    def run(self, tokens: I64, parents: Sequence[int]) -> Tensor:
        """Adds tokens (n,) as rows len(self), len(self) + 1, ... and returns their states (n, D).

        parents: the row before each, P - 1 for the first token after the prompt; rows of this call come after their parents.
        """
        first = len(self)
        for parent in parents:
            above = [] if parent == self._prompt - 1 else [self._paths[parent - self._prompt]]
            self._paths.append(np.concatenate([*above, [len(self)]]))
        paths = self._paths[first - self._prompt :]
        depths = np.asarray([len(path) for path in paths], dtype=np.int64)
        flat, owner = np.concatenate(paths), np.repeat(np.arange(len(paths)), depths)
        old = np.unique(flat[flat < first])
        seen = np.concatenate([np.arange(self._prompt), old])  # (S,)
        visible = np.zeros((len(tokens), len(seen) + len(tokens)), dtype=bool)
        visible[:, : self._prompt] = True
        visible[owner, np.where(flat < first, self._prompt + np.searchsorted(old, flat), len(seen) + flat - first)] = True
        positions = self._prompt + depths - 1
        lengths = np.asarray([len(self._paths[row - self._prompt]) for row in old.tolist()], dtype=np.int64)
        places = np.concatenate([np.arange(self._prompt), self._prompt + lengths - 1, positions])
        return self._forward(tokens, positions, seen, visible, places)

    def _forward(self, tokens: I64, positions: I64, seen: I64, visible: Any, places: I64) -> Tensor:
        """tokens, positions (n,), seen (S,), visible (n, S + n) bool, places (S + n,): the positions of its columns -> (n, D)."""
        device, config, num = self._weight.device, self._base.config, len(tokens)
        padding = self._padding(num)
        if padding:
            tokens, positions, places = (np.pad(array, (0, padding)) for array in (tokens, positions, places))
            visible = np.pad(visible, ((0, padding), (0, padding)))
            visible[num:, -padding:] |= np.eye(padding, dtype=bool)  # a row that sees nothing would be NaN
        self._now.seen, self._now.kept = torch.from_numpy(seen).to(device), num
        mask, rows, columns = (torch.from_numpy(array).to(device) for array in (visible, positions, places))

        def make(window: int | None) -> Tensor:
            near = mask if window is None else mask & (rows[:, None] - columns[None] < window)
            return dense_mask(near, config, self._weight.dtype)

        output = self._base.base_model(
            input_ids=torch.from_numpy(tokens).to(device)[None],
            position_ids=rows[None],
            attention_mask=for_layers(config, make),
            past_key_values=self._cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state[0, :num]
        return hidden

    def _padding(self, num: int) -> int:
        """oneDNN compiles each product in bfloat16 for its shape, so few lengths must come."""
        few = self._weight.dtype == torch.bfloat16 and self._weight.device.type == "cpu"
        return one_of_few(num) - num if few else 0
