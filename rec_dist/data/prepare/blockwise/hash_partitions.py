"""Steps on the rows of one bucket of users: time order, repeats, the k-core's counts, and on to ranges of users in file order.

Letters: N rows of a bucket, U its users, I items with distinct titles. Memory: about 150 bytes a row of a bucket.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.data.prepare.blockwise.hash_shuffle import read_bucket
from rec_dist.data.prepare.blockwise.scratch import Array, column, load_array, read_batch, save_array, write_batches
from rec_dist.data.prepare.positives import Rows, count_ties, first_of_each_pair, in_time_order
from rec_dist.data.sources.interactions import Bool
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class GlobalBatchSampler:
    """A job a bucket: rows in time order, a user's first row of an item each. Returns (rows, repeats, choices)."""

    work: Path
    first_rows: I64
    least: float | None  # data.min_rating

    def __call__(self, bucket: int) -> tuple[int, int, int]:
        raw = read_bucket(self.work, bucket, self.first_rows)
        chosen = np.ones(len(raw.user), dtype=bool)
        if raw.rating is not None and self.least is not None:
            chosen = raw.rating >= np.float32(self.least)
        timestamp = raw.row if raw.timestamp is None else raw.timestamp
        every = in_time_order(Rows(raw.user, raw.item, timestamp, raw.rating, chosen))
        once = first_of_each_pair(every)
        columns = {
            "user": once.user.astype(np.int32),
            "item": once.item.astype(np.int32),
            "timestamp": once.timestamp,
            "chosen": once.chosen,
        }
        columns |= {} if once.rating is None else {"rating": once.rating}
        write_batches(once_path(self.work, bucket), [columns])
        _, first = np.unique(raw.user, return_index=True)
        write_batches(users_path(self.work, bucket), [{"name": raw.raw_users, "row": raw.row[first]}])
        return len(every), len(every) - len(once), int(once.chosen.sum())


@dataclass(frozen=True)
class CoreCount:
    """A job a bucket: how often items that are alive are chosen by users with enough choices of such, as (items, counts)."""

    work: Path
    min_user: int
    alive_path: Path  # (I,) bool

    def __call__(self, bucket: int) -> tuple[I64, I64]:
        batch = read_batch(once_path(self.work, bucket))
        kept = _kept(batch, load_array(self.alive_path), self.min_user)
        items, counts = np.unique(column(batch, "item")[kept & _chosen(batch)], return_counts=True)
        return items.astype(np.int64), counts.astype(np.int64)


@dataclass(frozen=True)
class CoreFacts:
    """What is left of a bucket. histograms: users, and their rows, by where in the source a user's first row stands."""

    users: int
    choices: int
    explicit_negatives: int
    ties: int
    followers: int
    user_histogram: I64
    row_histogram: I64


@dataclass(frozen=True)
class Describe:
    """A job a bucket: counts of what the k-core leaves; saves its choices' timestamps in ascending order."""

    work: Path
    min_user: int
    alive_path: Path
    num_rows: int  # of the source
    num_bins: int

    def __call__(self, bucket: int) -> CoreFacts:
        batch = read_batch(once_path(self.work, bucket))
        kept = _kept(batch, load_array(self.alive_path), self.min_user)
        chosen = kept & _chosen(batch)
        user, times = column(batch, "user")[chosen], column(batch, "timestamp")[chosen]
        ties, followers = count_ties(user, times)
        save_array(times_path(self.work, bucket), np.sort(times))
        rows = np.bincount(column(batch, "user")[kept])
        left = np.flatnonzero(rows)
        place = bins(column(read_batch(users_path(self.work, bucket)), "row")[left], self.num_rows, self.num_bins)
        return CoreFacts(
            users=len(left),
            choices=int(chosen.sum()),
            explicit_negatives=int(kept.sum() - chosen.sum()),
            ties=ties,
            followers=followers,
            user_histogram=np.bincount(place, minlength=self.num_bins).astype(np.int64),
            row_histogram=np.bincount(place, weights=rows[left], minlength=self.num_bins).astype(np.int64),
        )


@dataclass(frozen=True)
class Deal:
    """A job a bucket: its users, with their rows, dealt to ranges of users by where their first row stands in the source.

    edges (P+1,): the first bin of each range. Writes dealt-NNNNNN.arrow, a record batch a range, a row a user.
    """

    work: Path
    min_user: int
    alive_path: Path
    num_rows: int
    num_bins: int
    edges: I64

    def __call__(self, bucket: int) -> None:
        batch, alive = read_batch(once_path(self.work, bucket)), load_array(self.alive_path)
        kept = np.flatnonzero(_kept(batch, alive, self.min_user))
        user = column(batch, "user")[kept]
        columns = {
            "item": (np.cumsum(alive) - 1).astype(np.int32)[column(batch, "item")[kept]],
            "timestamp": column(batch, "timestamp")[kept],
            "chosen": column(batch, "chosen")[kept],
        }
        columns |= {"rating": column(batch, "rating")[kept]} if "rating" in batch.schema.names else {}
        left, starts = np.unique(user, return_index=True)
        offsets = pa.array(np.append(starts, len(user)), pa.int32())
        people = read_batch(users_path(self.work, bucket))
        first = column(people, "row")[left]
        place = np.searchsorted(self.edges, bins(first, self.num_rows, self.num_bins), side="right") - 1
        table = pa.RecordBatch.from_pydict(
            {"name": people.column("name").take(pa.array(left)), "row": pa.array(first)}
            | {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
        )
        order = np.argsort(place, kind="stable")
        cuts = np.searchsorted(place[order], np.arange(len(self.edges)))
        ranges = [table.take(pa.array(order[begin:end])) for begin, end in pairwise(cuts.tolist())]
        write_batches(dealt_path(self.work, bucket), [dict(zip(part.schema.names, part.columns, strict=True)) for part in ranges])


def bins(rows: Array, num_rows: int, num_bins: int) -> I64:
    """Which of num_bins equal stretches of the source each row stands in."""
    return (rows.astype(np.int64) // -(-num_rows // num_bins)).astype(np.int64)


def _chosen(batch: pa.RecordBatch) -> Bool:
    return column(batch, "chosen").view(np.bool_)


def _kept(batch: pa.RecordBatch, alive: Array, min_user: int) -> Bool:
    """Rows (N,) whose item is alive and whose user has min_user choices of items alive."""
    user, kept = column(batch, "user"), alive[column(batch, "item")].astype(bool)
    choices = np.bincount(user[kept & _chosen(batch)], minlength=int(user.max()) + 1 if len(user) else 0)
    return kept & (choices >= min_user)[user]


def once_path(work: Path, bucket: int) -> Path:
    """A bucket's rows in time order, without repeats."""
    return work / f"once-{bucket:06d}.arrow"


def users_path(work: Path, bucket: int) -> Path:
    """A bucket's users: names and the place of their first row."""
    return work / f"users-{bucket:06d}.arrow"


def times_path(work: Path, bucket: int) -> Path:
    """The timestamps of a bucket's choices, ascending."""
    return work / f"times-{bucket:06d}.npy"


def dealt_path(work: Path, bucket: int) -> Path:
    """A bucket's users by ranges."""
    return work / f"dealt-{bucket:06d}.arrow"
