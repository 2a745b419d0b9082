"""Global batches: which examples make up step n, which micro-batches hold them, and which rank runs which micro-batch.

The order of examples and the steps depend only on (seed, epoch, global batch size). World size and token budget decide only how
the examples of a step are assigned to ranks, so every packing computes the same sums. The state of the sampler is one integer:
the step.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heapreplace
from itertools import chain, pairwise

import numpy as np

from rec_dist.data.dataset.ragged import offsets_of, sums
from rec_dist.runtime.arrays import I64
from rec_dist.runtime.rng import hash_u64, permute

_RUN, _BEGIN = -1, -2  # streams of draws; those of the windows are numbered from 0
_RUNS_A_WINDOW = 16  # a window mixes users from this many places


@dataclass(frozen=True)
class GlobalBatchSampler:
    """The order of examples: each epoch is a pseudo-random permutation that takes O(1) memory and O(1) time per example.

    num_examples: examples of one epoch. examples_per_step: examples of one global batch. max_steps: ends the run earlier than
    the epochs. window: how many examples are shuffled together, so that consecutive steps read few shards; None means a whole
    epoch.
    """

    num_examples: int
    examples_per_step: int
    epochs: int
    seed: int
    max_steps: int | None = None
    window: int | None = None

    @property
    def num_steps(self) -> int:
        """The steps of all epochs. The last step may be short; no example is dropped."""
        steps = -(-self.num_examples * self.epochs // self.examples_per_step)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def examples_of_step(self, step: int) -> tuple[I64, I64]:
        """The examples of step `step` (0-based) as (examples, epochs), both (u,) int64. A step can span two epochs."""
        start = step * self.examples_per_step
        index = np.arange(start, min(start + self.examples_per_step, self.num_examples * self.epochs), dtype=np.int64)
        epochs = index // self.num_examples
        examples = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            examples[here] = self._shuffled(index[here] % self.num_examples, epoch)
        return examples, epochs

    def _shuffled(self, position: I64, epoch: int) -> I64:
        """The examples at these positions of an epoch."""
        if self.window is None or self.window >= self.num_examples:
            return permute(position, self.num_examples, self.seed, epoch)
        mixed = np.empty_like(position)
        for number in np.unique(position // self.window).tolist():
            here = position // self.window == number
            start = number * self.window
            size = min(self.window, self.num_examples - start)
            mixed[here] = start + permute(position[here] - start, size, self.seed, epoch, number)
        return self._from_runs(mixed, epoch)

    def _from_runs(self, place: I64, epoch: int) -> I64:
        """Shuffles runs of neighbouring examples and starts each epoch at another example. An incomplete run comes last."""
        assert self.window is not None
        length = max(1, self.window // _RUNS_A_WINDOW)
        num_runs = self.num_examples // length
        run = permute(np.minimum(place // length, num_runs - 1), num_runs, self.seed, epoch, _RUN)
        neighbour = np.where(place < num_runs * length, run * length + place % length, place)
        begin = int(hash_u64(self.seed, epoch, _BEGIN) % np.uint64(self.num_examples))
        return (neighbour + begin) % self.num_examples


def pack_by_tokens(lengths: I64, capacity: int) -> list[list[int]]:
    """Packs items of `lengths` (U,) tokens into few micro-batches of at most `capacity` tokens, by best-fit decreasing.

    It is deterministic: ties go to the earlier item and the earlier micro-batch. No item may be longer than the capacity.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= capacity, (
        "an item is longer than a micro-batch; set-up should have rejected it"
    )
    micro_batches: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, micro-batch), ascending
    for length, items in _longest_first(lengths):
        done = 0
        while done < len(items):
            place = bisect_left(rooms, (length, -1))
            left, micro_batch = rooms.pop(place) if place < len(rooms) else (capacity, len(micro_batches))
            if micro_batch == len(micro_batches):
                micro_batches.append([])
            fit = min(left // length, len(items) - done)  # while it has room, the tightest stays the tightest
            micro_batches[micro_batch] += items[done : done + fit]
            done += fit
            insort(rooms, (left - fit * length, micro_batch))
    return micro_batches


def pack_evenly(lengths: I64, capacity: int, world_size: int) -> list[list[int]]:
    """Packs evenly into as few micro-batches as pack_by_tokens, rounded up to a multiple of `world_size`.

    Even packing matters because ranks wait for the longest micro-batch.
    Puts the longest item first, always into the emptiest micro-batch. If that overfills one, returns the result of
    pack_by_tokens.
    """
    tight = pack_by_tokens(lengths, capacity)
    count = min(-(-len(tight) // world_size) * world_size, len(lengths))
    micro_batches: list[list[int]] = [[] for _ in range(count)]
    used = list(range(count))  # a heap of tokens * count + micro-batch: integers compare faster than pairs
    for length, items in _longest_first(lengths):
        for item in items:
            emptiest = used[0]
            micro_batches[emptiest % count].append(item)
            heapreplace(used, emptiest + length * count)
    return micro_batches if count and max(used) // count <= capacity else tight


def _longest_first(lengths: I64) -> Iterator[tuple[int, list[int]]]:
    """Yields each length with its items, longest first; items of one length in their order."""
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1)) if len(ordered) else order
    for begin, end in pairwise([*begins.tolist(), len(ordered)]):
        yield int(ordered[begin]), order[begin:end].tolist()


def assign_to_ranks(micro_batches: list[list[int]], lengths: I64, world_size: int) -> list[list[list[int]]]:
    """Assigns micro-batches to ranks, the largest first, each to the rank with the least work.

    Every rank gets the same number; it is filled up with dummy batches ([]). Returns ranks[r][m]: the examples of micro-batch m
    on rank r.
    """
    per_rank = -(-len(micro_batches) // world_size)
    offsets = offsets_of(np.asarray([len(micro_batch) for micro_batch in micro_batches], dtype=np.int64))
    items = np.fromiter(chain.from_iterable(micro_batches), dtype=np.int64, count=int(offsets[-1]))
    sizes = sums(lengths[items], offsets)  # (micro-batches,) tokens
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    open_ranks = [(0, rank) for rank in range(world_size)]  # a heap of (tokens, rank)
    for micro_batch in np.argsort(-sizes, kind="stable").tolist():
        work, rank = open_ranks[0]
        ranks[rank].append(sorted(micro_batches[micro_batch]))
        if len(ranks[rank]) < per_rank:
            heapreplace(open_ranks, (work + int(sizes[micro_batch]), rank))
        else:
            heappop(open_ranks)
    for assigned in ranks:
        assigned.extend([] for _ in range(per_rank - len(assigned)))
    return ranks
