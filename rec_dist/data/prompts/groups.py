"""The examples of a step as item ids: their histories, their negatives or candidates, and where their groups branch off.

All of a step are drawn at once, because the titles of what is drawn decide the lengths, and the lengths decide the packing.
Nothing is tokens yet: grouped_prompts.py gives their sizes, and builds those that a rank trains on.

U examples, G groups, H history items, K negatives a group, L candidates that a prompt lists.
"""

from dataclasses import dataclass

import numpy as np

from rec_dist.data.dataset.prepared_data import SequenceSplit
from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.sampling.many_draws import SeenItems
from rec_dist.data.sampling.negatives import NegativeSampler, draw_many_candidates
from rec_dist.data.sampling.targets import TargetIndex
from rec_dist.runtime.arrays import I32, I64


@dataclass(frozen=True)
class Groups:
    """Those of U examples. Example u has the history items at history_offsets (U+1,) and the groups at group_offsets (U+1,)."""

    history: I32  # (H,) item ids
    history_offsets: I64
    completions: I32  # (G, 1 + K) item ids, the chosen one first
    keys: I64  # (G,)
    branch_at: I64  # (G,): how many history items a group sees
    group_offsets: I64
    listed: I32  # (U, L) item ids

    def of(self, examples: I64) -> "Groups":
        """Those of the chosen examples, in this order."""
        items, sizes = np.diff(self.history_offsets)[examples], np.diff(self.group_offsets)[examples]
        groups = runs(self.group_offsets[examples], sizes)
        return Groups(
            history=self.history[runs(self.history_offsets[examples], items)],
            history_offsets=offsets_of(items),
            completions=self.completions[groups],
            keys=self.keys[groups],
            branch_at=self.branch_at[groups],
            group_offsets=offsets_of(sizes),
            listed=self.listed[examples],
        )


@dataclass(frozen=True)
class _Rows:
    """The rows of U examples up to their last targets, and the position of each target (G,) in the row of its example owner."""

    numbers: I64  # (U,) rows of the split
    seen: SeenItems
    begins: I64  # (U,) position of the first item of the history
    stops: I64  # (U,)
    group_offsets: I64
    owner: I64
    positions: I64

    def groups(self, split: SequenceSplit, completions: I32, epochs: I64, listed: I32) -> Groups:
        """A key names a target and the draw of its negatives, so that epochs with other negatives have other references."""
        items = self.stops - 1 - self.begins
        return Groups(
            history=self.seen.items[runs(self.seen.offsets[:-1] + self.begins, items)],
            history_offsets=offsets_of(items),
            completions=completions,
            keys=epochs[self.owner] * split.num_items + split.offsets[self.numbers][self.owner] + self.positions,
            branch_at=self.positions - self.begins[self.owner],
            group_offsets=self.group_offsets,
            listed=listed,
        )


def draw_groups(
    split: SequenceSplit, targets: TargetIndex, sampler: NegativeSampler, indices: I64, epochs: I64, *, max_history: int
) -> Groups:
    """The examples `indices` (U,) of `targets`, with the negatives drawn for epochs (U,)."""
    rows = _rows(split, targets, indices, len(sampler.train_counts), max_history)
    completions = np.empty((len(rows.owner), 1 + sampler.num), dtype=np.int32)
    completions[:, 0] = rows.seen.items[rows.seen.offsets[rows.owner] + rows.positions]
    completions[:, 1:] = _negatives(split, sampler, rows, epochs)
    return rows.groups(split, completions, epochs, np.empty((len(indices), 0), dtype=np.int32))


def draw_listed_groups(
    split: SequenceSplit,
    targets: TargetIndex,
    indices: I64,
    epochs: I64,
    *,
    seeds: I64,
    num_listed: int,
    num_negatives: int,
    num_items: int,
    max_history: int,
) -> Groups:
    """As draw_groups, for prompts that list num_listed candidates. An example has one target.

    seeds (U,): of the draws. The list is in random order, so its first num_negatives items other than the target are a random
    choice of them.
    """
    rows = _rows(split, targets, indices, num_items, max_history)
    assert len(rows.owner) == len(indices), "a prompt that lists candidates has one target"
    listed = draw_many_candidates(
        seeds=seeds, users=split.user_ids[rows.numbers], positions=rows.positions, seen=rows.seen, rows=rows.owner, num=num_listed
    )
    chosen = rows.seen.items[rows.seen.offsets[:-1] + rows.positions]
    rejected = listed[listed != chosen[:, None]].reshape(len(chosen), num_listed - 1)[:, :num_negatives]
    return rows.groups(split, np.concatenate([chosen[:, None], rejected], axis=1), epochs, listed)


def _rows(split: SequenceSplit, targets: TargetIndex, indices: I64, num_items: int, max_history: int) -> _Rows:
    numbers, starts, stops = targets.rows[indices], targets.starts[indices], targets.stops[indices]
    return _Rows(
        numbers=numbers,
        seen=SeenItems(split.take(numbers, stops), offsets_of(stops), num_items),
        begins=np.maximum(0, starts - max_history),
        stops=stops,
        group_offsets=offsets_of(stops - starts),
        owner=np.repeat(np.arange(len(numbers)), stops - starts),
        positions=runs(starts, stops - starts),
    )


def _negatives(split: SequenceSplit, sampler: NegativeSampler, rows: _Rows, epochs: I64) -> I32:
    """(G, K): the negatives of each target."""
    owner, positions, users = rows.owner, rows.positions, split.user_ids[rows.numbers]
    if not sampler.one_by_one:
        return sampler.draw_many(
            epochs=epochs[owner], users=users[owner], positions=positions, seen=rows.seen, rows=owner, counts=positions + 1
        )
    drawn = np.empty((len(owner), sampler.num), dtype=np.int32)
    for group, (example, position) in enumerate(zip(owner.tolist(), positions.tolist(), strict=True)):
        drawn[group] = sampler.draw(
            epoch=int(epochs[example]),
            user=int(users[example]),
            position=position,
            seen=rows.seen.first(example, position + 1),
            explicit_negatives=split.explicit_negatives_of(int(rows.numbers[example])),
        )
    return drawn
