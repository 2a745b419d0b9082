"""A pass over a packed batch that runs only what no earlier pass has: the ends of its prompts, and the completions.

The layers take keys and values of the other rows from a PromptCache, in the places where the batch has them. So masks, positions
and the head are those of the whole batch, and rows that did not run are zeros before the head, which reads none of them. Attention
goes prompt by prompt, or through a dense mask; FlexAttention would need block masks of fewer queries than keys.
Cost: in each layer a copy of the keys and values of the batch, and of those that are to be kept.

T rows of a batch, R rows that run, H heads with keys and values, D width of a head.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from rec_dist.models.prompt_cache import PromptCache
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist.runtime.arrays import I64

if TYPE_CHECKING:
    from rec_dist.models.prompt_cache import Layers


@dataclass(frozen=True)
class PastPrompts:
    """Of one batch. num_kept (prompts,): leading rows of each that do not run. rows (R,): those that run.

    old: (first row, rows, layers) of kept prompts. new: (first row, tokens, layers) of prompts to keep, whose layers a pass fills.
    """

    num_kept: I64
    rows: I64
    old: list[tuple[int, int, "Layers"]]
    new: list[tuple[int, I64, "Layers"]]

    def padded(self, num_rows: int, missing: int) -> "PastPrompts":
        """With `missing` rows of padding behind the num_rows of the batch, which are one prompt and all run."""
        if not missing:
            return self
        rows = np.append(self.rows, num_rows + np.arange(missing))
        return replace(self, num_kept=np.append(self.num_kept, 0), rows=rows)

    def cache(self, num_layers: int, rows: Tensor, num_rows: int) -> Cache:
        """What the decoder takes as past_key_values. rows: those that run, padding included, of num_rows in all."""
        return Cache(layers=[_PastLayer(number, self, rows, num_rows) for number in range(num_layers)])


class _PastLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of one pass."""

    def __init__(self, number: int, past: PastPrompts, rows: Tensor, num_rows: int) -> None:
        super().__init__()
        self._number, self._past, self._rows, self._num_rows = number, past, rows, num_rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(1, H, R, D) each -> (1, H, T, D) each."""
        keys, values = (self._whole(states, part) for part, states in enumerate((key_states, value_states)))
        for first, tokens, layers in self._past.new:
            own = slice(first, first + len(tokens))
            layers.append((keys[0, :, own].clone(), values[0, :, own].clone()))
        return keys, values

    def _whole(self, states: Tensor, part: int) -> Tensor:
        if not self._past.old:
            return states
        whole = states.new_empty(*states.shape[:2], self._num_rows, states.shape[3])
        whole.index_copy_(2, self._rows, states)
        for first, kept, layers in self._past.old:
            whole[0, :, first : first + kept] = layers[self._number][part][:, :kept]
        return whole


def past_of(batch: PackedBatch, cache: PromptCache, model: int, common: int) -> PastPrompts:
    """Looks up the prompts of a batch on the host. model, common: as in PromptCache.find."""
    tokens, sizes = batch.input_ids.numpy(), batch.sizes
    starts = np.cumsum(sizes.sum(axis=1)) - sizes.sum(axis=1)
    old: list[tuple[int, int, Layers]] = []
    new: list[tuple[int, I64, Layers]] = []
    num_kept, runs = np.zeros(len(sizes), dtype=np.int64), np.ones(batch.num_tokens, dtype=bool)
    for number, (first, length) in enumerate(zip(starts.tolist(), sizes[:, 0].tolist(), strict=True)):
        prompt = tokens[first : first + length]
        kept, layers = cache.find(model, prompt, common)
        num_kept[number] = kept
        runs[first : first + kept] = False
        if kept:
            old.append((first, kept, layers))
        if kept < length - 1:
            new.append((first, prompt, []))
    assert runs[batch.rows.numpy()].all(), "a token is scored before the end of its prompt"
    return PastPrompts(num_kept, np.flatnonzero(runs), old, new)


def keep(past: PastPrompts, cache: PromptCache, model: int) -> None:
    """Keeps the prompts of a batch after its pass."""
    for _, tokens, layers in past.new:
        cache.keep(model, tokens, layers)
