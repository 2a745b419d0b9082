"""The deterministic global plan: which units make step n, which packs hold them, which rank runs which pack.

Order and steps depend only on (seed, epoch, global batch). World size and token budget decide only how a step's units are
dealt out, so every packing computes the same sums. The state of the stream is one integer: the step.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np

from rec_dist.runtime.rng import hash_u64, permute
from rec_dist.stream.trunk import I64

_RUN, _BEGIN = -1, -2  # streams of draws beside those of the windows, which are numbered from 0
_RUNS_A_WINDOW = 16  # so that a window mixes users of as many places


@dataclass(frozen=True)
class Order:
    """The endless order of units: epoch after epoch, each a pseudo-random permutation in O(1) memory and O(1) in the position.

    num_units: units of one epoch. units_per_step: units of one global step. max_steps: ends the run within the epochs.
    window: units that are shuffled together, so that a stretch of steps reads few shards; None: all of an epoch.
    """

    num_units: int
    units_per_step: int
    epochs: int
    seed: int
    max_steps: int | None = None
    window: int | None = None

    @property
    def num_steps(self) -> int:
        """Steps in all epochs; the last one may be short, none is dropped."""
        steps = -(-self.num_units * self.epochs // self.units_per_step)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def units_of_step(self, step: int) -> tuple[I64, I64]:
        """(units, epochs), both (u,) int64: what step `step` (0-based) trains on. A step may span two epochs."""
        start = step * self.units_per_step
        index = np.arange(start, min(start + self.units_per_step, self.num_units * self.epochs), dtype=np.int64)
        epochs = index // self.num_units
        units = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            units[here] = self._shuffled(index[here] % self.num_units, epoch)
        return units, epochs

    def _shuffled(self, position: I64, epoch: int) -> I64:
        """The units at these positions of an epoch."""
        if self.window is None or self.window >= self.num_units:
            return permute(position, self.num_units, self.seed, epoch)
        mixed = np.empty_like(position)
        for number in np.unique(position // self.window).tolist():
            here = position // self.window == number
            start = number * self.window
            size = min(self.window, self.num_units - start)
            mixed[here] = start + permute(position[here] - start, size, self.seed, epoch, number)
        return self._from_runs(mixed, epoch)

    def _from_runs(self, place: I64, epoch: int) -> I64:
        """Runs of neighbouring units in a shuffled order, from another unit on each epoch; what makes no whole run is its end."""
        assert self.window is not None
        length = max(1, self.window // _RUNS_A_WINDOW)
        num_runs = self.num_units // length
        run = permute(np.minimum(place // length, num_runs - 1), num_runs, self.seed, epoch, _RUN)
        neighbour = np.where(place < num_runs * length, run * length + place % length, place)
        begin = int(hash_u64(self.seed, epoch, _BEGIN) % np.uint64(self.num_units))
        return (neighbour + begin) % self.num_units


def pack_by_tokens(lengths: I64, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: puts items of `lengths` (U,) tokens into the fewest packs of at most `capacity` it can find.

    Deterministic; ties go to the earlier item and the earlier pack. An item longer than the capacity is the caller's error.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= capacity, "an item is longer than a pack; checked at set-up"
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for item, length in _longest_first(lengths):
        place = bisect_left(rooms, (length, -1))
        left, pack = rooms.pop(place) if place < len(rooms) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(item)
        insort(rooms, (left - length, pack))
    return packs


def pack_evenly(lengths: I64, capacity: int, world_size: int) -> list[list[int]]:
    """As few packs as pack_by_tokens, rounded up to a multiple of `world_size`, and as even as it can: ranks wait for the longest.

    Longest item first to the emptiest pack; where that overfills one, the packs of pack_by_tokens are taken as they are.
    """
    tight = pack_by_tokens(lengths, capacity)
    count = min(-(-len(tight) // world_size) * world_size, len(lengths))
    packs: list[list[int]] = [[] for _ in range(count)]
    used = [(0, pack) for pack in range(count)]  # a heap of (tokens, pack)
    for item, length in _longest_first(lengths):
        tokens, pack = used[0]
        packs[pack].append(item)
        heapreplace(used, (tokens + length, pack))
    return packs if count and max(used)[0] <= capacity else tight


def _longest_first(lengths: I64) -> Iterator[tuple[int, int]]:
    """(item, length), longest first; ties in the order of the items."""
    order = np.argsort(-lengths, kind="stable")
    return zip(order.tolist(), lengths[order].tolist(), strict=True)


def deal(packs: list[list[int]], lengths: I64, world_size: int) -> list[list[list[int]]]:
    """Deals packs to ranks, largest first to the rank with the least work; every rank gets the same number, [] where it has none.

    Returns ranks[r][m] = the units of micro-batch m on rank r.
    """
    per_rank = -(-len(packs) // world_size)
    sizes = np.asarray([int(lengths[pack].sum()) for pack in packs], dtype=np.int64)
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    work = [0] * world_size
    for pack in np.argsort(-sizes, kind="stable").tolist():
        open_ranks = [rank for rank in range(world_size) if len(ranks[rank]) < per_rank]
        rank = min(open_ranks, key=lambda r: (work[r], r))
        ranks[rank].append(sorted(packs[pack]))
        work[rank] += int(sizes[pack])
    for dealt in ranks:
        dealt.extend([] for _ in range(per_rank - len(dealt)))
    return ranks
