"""Steps on the rows of one hash partition: time order, repeats, the counts of the k-core, and the move to row ranges.

Letters: N rows of a partition, U its users, I items with distinct titles. Memory: about 150 bytes per row of a partition.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from rec_dist.data.prepare.blockwise.hash_shuffle import read_partition
from rec_dist.data.prepare.blockwise.scratch import (
    Array,
    Work,
    WorkFile,
    column,
    load_array,
    read_batch,
    save_array,
    write_batches,
)
from rec_dist.data.prepare.positives import count_ties, in_core, ordered
from rec_dist.data.sources.interactions import Bool
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class OrderRows:
    """Orders the rows of a partition in time and keeps a user's first row of each item. Returns (rows, repeats, positives)."""

    work: Work
    first_rows: I64
    least: float | None  # data.min_rating
    digits: int  # of the timestamps' fractions

    def __call__(self, partition: int) -> tuple[int, int, int]:
        raw = read_partition(self.work, partition, self.first_rows, self.digits)
        timestamp = raw.row if raw.timestamp is None else raw.timestamp
        once, repeats = ordered(raw.user, raw.item, timestamp, raw.rating, self.least)
        columns = {
            "user": once.user.astype(np.int32),
            "item": once.item.astype(np.int32),
            "timestamp": once.timestamp,
            "positive": once.positive,
        }
        columns |= {} if once.rating is None else {"rating": once.rating}
        write_batches(once_file(self.work, partition), [columns])
        _, first = np.unique(raw.user, return_index=True)
        write_batches(users_file(self.work, partition), [{"name": raw.raw_users, "row": raw.row[first]}])
        return len(raw.user), repeats, int(once.positive.sum())


@dataclass(frozen=True)
class CoreCount:
    """Counts the positives of each item alive, by users with enough positives of items alive. Returns (items, counts)."""

    work: Work
    min_user: int
    alive: WorkFile  # (I,) bool

    def __call__(self, partition: int) -> tuple[I64, I64]:
        batch = read_batch(once_file(self.work, partition))
        kept = _kept(batch, load_array(self.alive), self.min_user)
        items, counts = np.unique(column(batch, "item")[kept & _positive(batch)], return_counts=True)
        return items.astype(np.int64), counts.astype(np.int64)


@dataclass(frozen=True)
class CoreFacts:
    """What the k-core leaves of a partition. The histograms count users and their rows by the bin of the user's first row."""

    users: int
    positives: int
    explicit_negatives: int
    ties: int
    followers: int
    user_histogram: I64
    row_histogram: I64


@dataclass(frozen=True)
class DescribeCore:
    """Counts what the k-core leaves of a partition, and saves the timestamps of its positives in ascending order."""

    work: Work
    min_user: int
    alive: WorkFile
    num_rows: int  # of the source
    num_bins: int

    def __call__(self, partition: int) -> CoreFacts:
        batch = read_batch(once_file(self.work, partition))
        kept = _kept(batch, load_array(self.alive), self.min_user)
        positive = kept & _positive(batch)
        user, times = column(batch, "user")[positive], column(batch, "timestamp")[positive]
        ties, followers = count_ties(user, times)
        save_array(times_file(self.work, partition), np.sort(times))
        rows = np.bincount(column(batch, "user")[kept])
        left = np.flatnonzero(rows)
        place = bins(column(read_batch(users_file(self.work, partition)), "row")[left], self.num_rows, self.num_bins)
        return CoreFacts(
            users=len(left),
            positives=int(positive.sum()),
            explicit_negatives=int(kept.sum() - positive.sum()),
            ties=ties,
            followers=followers,
            user_histogram=np.bincount(place, minlength=self.num_bins).astype(np.int64),
            row_histogram=np.bincount(place, weights=rows[left], minlength=self.num_bins).astype(np.int64),
        )


@dataclass(frozen=True)
class ToRowRanges:
    """Groups the users of a partition, with their rows, by the row range of their first row in the source.

    edges (P+1,): the first bin of each range. Writes by-range-NNNNNN.arrow: a record batch per range, a row per user.
    """

    work: Work
    min_user: int
    alive: WorkFile
    num_rows: int
    num_bins: int
    edges: I64

    def __call__(self, partition: int) -> None:
        batch, alive = read_batch(once_file(self.work, partition)), load_array(self.alive)
        kept = np.flatnonzero(_kept(batch, alive, self.min_user))
        user = column(batch, "user")[kept]
        columns = {
            "item": (np.cumsum(alive) - 1).astype(np.int32)[column(batch, "item")[kept]],
            "timestamp": column(batch, "timestamp")[kept],
            "positive": column(batch, "positive")[kept],
        }
        columns |= {"rating": column(batch, "rating")[kept]} if "rating" in batch.schema.names else {}
        left, starts = np.unique(user, return_index=True)
        offsets = pa.array(np.append(starts, len(user)), pa.int32())
        people = read_batch(users_file(self.work, partition))
        first = column(people, "row")[left]
        place = np.searchsorted(self.edges, bins(first, self.num_rows, self.num_bins), side="right") - 1
        table = pa.RecordBatch.from_pydict(
            {"name": people.column("name").take(pa.array(left)), "row": pa.array(first)}
            | {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
        )
        order = np.argsort(place, kind="stable")
        cuts = np.searchsorted(place[order], np.arange(len(self.edges)))
        ranges = [table.take(pa.array(order[begin:end])) for begin, end in pairwise(cuts.tolist())]
        write_batches(by_range_file(self.work, partition), ranges)


def bins(rows: Array, num_rows: int, num_bins: int) -> I64:
    """The bin of each row: num_bins bins divide the source into equal stretches."""
    return (rows.astype(np.int64) // -(-num_rows // num_bins)).astype(np.int64)


def _positive(batch: pa.RecordBatch) -> Bool:
    return column(batch, "positive").view(np.bool_)


def _kept(batch: pa.RecordBatch, alive: Array, min_user: int) -> Bool:
    """(N,): the rows that are in the core, as in_core has it."""
    return in_core(column(batch, "user"), column(batch, "item"), _positive(batch), alive.astype(bool), min_user)


def once_file(work: Work, partition: int) -> WorkFile:
    """The rows of a partition in time order, without repeats."""
    return work / f"once-{partition:06d}.arrow"


def users_file(work: Work, partition: int) -> WorkFile:
    """The users of a partition: their names and the place of their first row."""
    return work / f"users-{partition:06d}.arrow"


def times_file(work: Work, partition: int) -> WorkFile:
    """The timestamps of a partition's positives, ascending."""
    return work / f"times-{partition:06d}.npy"


def by_range_file(work: Work, partition: int) -> WorkFile:
    """The users of a partition, grouped by row range."""
    return work / f"by-range-{partition:06d}.arrow"
