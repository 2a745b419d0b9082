"""Keys and values of prompts, kept between calls: the least recently used go first, and a prompt that begins like another uses it.

Why: a user who asks again has the same history, or the same with more items at its end. A row of a causal model depends on the
tokens up to it alone, so two prompts share the keys and values of all tokens before the first that differs, whatever that is: a
longer or shorter history, one changed in its middle, or one whose window has moved.
Cost: 46 KB a token for SmolLM2-135M in float32 (30 layers, 3 heads of 64 with keys and values), 23 KB in bfloat16; about 20 us to
look a prompt up.

P tokens of a prompt, H heads with keys and values, D width of a head.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # what only counts prompts need not wait for torch
    from torch import Tensor

    Layers = list[tuple[Tensor, Tensor]]  # keys and values (H, P, D) of each layer


@dataclass(frozen=True)
class PromptCounts:
    """Prompts that were scored. hits: all tokens but the last were kept. extensions: some behind what every prompt begins with.

    evictions: prompts that made room for others.
    """

    hits: int = 0
    extensions: int = 0
    misses: int = 0
    evictions: int = 0

    def plus(self, **more: int) -> "PromptCounts":
        """With more of some."""
        return PromptCounts(**{name: value + more.get(name, 0) for name, value in vars(self).items()})


class PromptCache:
    """Up to max_bytes of keys and values of any number of models, each under a number of its own. For one thread.

    No prompt is kept whose tokens another one begins with.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[int, bytes], Layers] = OrderedDict()  # the least recently used first
        self._sorted: dict[int, list[bytes]] = {}  # of each model
        self._counts = PromptCounts()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, model: int, tokens: npt.NDArray[Any], common: int) -> tuple[int, "Layers"]:
        """How many leading tokens of a prompt (P,) are kept, at most P - 1, since the last must run; and layers with these or more.

        common: tokens that every prompt begins with.
        """
        key, found, best = _key(tokens), 0, b""
        known = self._sorted.get(model, [])
        place = bisect_left(known, key)
        for other in known[max(place - 1, 0) : place + 1]:  # among sorted texts the longest common beginning is a neighbour's
            if (same := _num_same(key, other)) > found:
                found, best = same, other
        found = min(found, len(tokens) - 1)
        outcome = "hits" if found == len(tokens) - 1 else "extensions" if found > common else "misses"
        self._counts = self._counts.plus(**{outcome: 1})
        if not found:
            return 0, []
        self._kept.move_to_end((model, best))
        return found, self._kept[model, best]

    def keep(self, model: int, tokens: npt.NDArray[Any], layers: "Layers") -> None:
        """Keeps a whole prompt, unless it alone is larger than max_bytes."""
        size = _size(layers)
        if size > self.max_bytes:
            return
        key, known = _key(tokens), self._sorted.setdefault(model, [])
        place = bisect_left(known, key)
        if place < len(known) and known[place].startswith(key):
            return
        if place and key.startswith(known[place - 1]):
            self._drop(model, known[place - 1])
        insort(known, key)
        self._kept[model, key] = layers
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self._drop(*next(iter(self._kept)))
            self._counts = self._counts.plus(evictions=1)

    def take_counts(self) -> PromptCounts:
        """What has been counted since the last call."""
        counts, self._counts = self._counts, PromptCounts()
        return counts

    def _drop(self, model: int, key: bytes) -> None:
        self.num_bytes -= _size(self._kept.pop((model, key)))
        known = self._sorted[model]
        del known[bisect_left(known, key)]


def _key(tokens: npt.NDArray[Any]) -> bytes:
    """Four bytes a token, the highest first, so that bytes are in the order of tokens."""
    return tokens.astype(">u4").tobytes()


def _num_same(one: bytes, other: bytes) -> int:
    """Leading tokens that two keys share."""
    length = min(len(one), len(other)) // 4
    a, b = (np.frombuffer(key, dtype=">u4", count=length) for key in (one, other))
    differing = np.flatnonzero(a != b)
    return int(differing[0]) if len(differing) else length


def _size(layers: "Layers") -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)
