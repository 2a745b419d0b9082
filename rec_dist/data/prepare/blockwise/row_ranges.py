"""Steps on one row range, whose users are in file order: the split, counts, and the shards.

Letters: U users of a range, N their positives. Memory: about 100 bytes per row of a range; writing a shard holds one record
batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.schema import SPLITS, shard_name
from rec_dist.data.prepare import rules
from rec_dist.data.prepare import splits as split_rules
from rec_dist.data.prepare.blockwise.hash_partitions import by_range_path
from rec_dist.data.prepare.blockwise.scratch import Array, column, load_array, read_batch, save_array, write_batches
from rec_dist.data.prepare.blockwise.selection import Lowest
from rec_dist.data.prepare.positives import Rows as UserRows
from rec_dist.data.prepare.shards import Rows, Sequences, batch_ranges, gather_rows, prefix_index, shard_ranges, write_shard
from rec_dist.data.prepare.splits import Cut
from rec_dist.data.sources.interactions import Bool
from rec_dist.runtime.arrays import I64
from rec_dist.storage.checksums import FileEntry


@dataclass(frozen=True)
class SplitRange:
    """Applies the split to the users of a range, in file order. Returns the smallest few-shot draws (empty if all users train).

    first_users (P+1,): how many users come before each range. cuts: the timestamps for global_temporal. cold_path: cold items (I,).
    """

    work: Path
    num_partitions: int
    first_users: I64
    config: DataConfig
    cuts: tuple[int, int] | None
    cold_path: Path | None

    def __call__(self, index: int) -> Lowest:
        parts = [read_batch(by_range_path(self.work, partition), index) for partition in range(self.num_partitions)]
        table = pa.Table.from_batches(parts).combine_chunks()
        table = table.take(pa.array(np.argsort(table["row"].to_numpy(), kind="stable")))
        lists = {name: table[name].combine_chunks() for name in table.schema.names if name not in ("name", "row")}
        item, timestamp = _values(lists["item"]), _values(lists["timestamp"])
        rating = _values(lists["rating"]) if "rating" in lists else None
        row_offsets = lists["item"].offsets.to_numpy().astype(np.int64)
        num_users = len(table)
        user = np.repeat(np.arange(num_users), np.diff(row_offsets))
        every = UserRows(user, item.astype(np.int64), timestamp, rating, _values(lists["positive"]).astype(bool))
        positives = every.take(every.positive)
        offsets = np.searchsorted(positives.user, np.arange(num_users + 1)).astype(np.int64)
        names = table["name"].combine_chunks()
        hashes = split_rules.hash_names(names.to_pylist())
        split = rules.split_users(self.config, positives.timestamp, offsets, hashes, self.cuts)
        explicit_negative_offsets, explicit_negatives = split_rules.training_explicit_negatives(every, split)
        if self.cold_path is not None:
            split = split_rules.hold_out(split, offsets, ~load_array(self.cold_path).astype(bool)[positives.item])
        sequences: dict[str, Array] = {"item": positives.item.astype(np.int32), "timestamp": positives.timestamp}
        sequences |= {} if positives.rating is None else {"rating": positives.rating}
        columns = {name: _lists(offsets, values) for name, values in sequences.items()}
        columns |= {"name": names, "explicit_negatives": _lists(explicit_negative_offsets, explicit_negatives.astype(np.int32))}
        for name, cut in zip(SPLITS, (split.train, split.valid, split.test), strict=True):
            columns |= {f"{name}_length": _spread(cut, cut.length, num_users)}
            columns |= {f"{name}_first": _spread(cut, cut.first_target, num_users)}
        draw = split_rules.few_shot_draw(hashes)
        write_batches(range_path(self.work, index), [columns | {"draw": draw}])
        limit = self.config.max_train_users
        if limit is None:
            return np.zeros(0), np.zeros(0, dtype=np.int64)
        drawn = draw[split.train.users]
        lowest = np.argsort(drawn, kind="stable")[:limit]
        return drawn[lowest], split.train.users[lowest] + int(self.first_users[index])


@dataclass(frozen=True)
class RangeFacts:
    """The rows and targets of each split in a range, and the items of the train split's rows with their counts."""

    rows: dict[str, int]
    targets: dict[str, int]
    train_items: I64
    train_counts: I64


@dataclass(frozen=True)
class RangeReader:
    """Reads ranges and their cuts. last: the last (draw, user) that few-shot training includes; None if all users train.

    cold_path: the cold items (I,), which the train and valid splits leave out; None without any.
    """

    work: Path
    first_users: I64
    last: tuple[float, int] | None
    cold_path: Path | None

    def cut(self, batch: pa.RecordBatch, index: int, split: str) -> Cut:
        """The rows of a split in a range. Users count from the first user of the range."""
        length = column(batch, f"{split}_length").astype(np.int64)
        kept = length > 0
        if split == "train" and self.last is not None:
            draw, user = self.last
            drawn, users = column(batch, "draw"), np.arange(len(length)) + int(self.first_users[index])
            kept &= (drawn < draw) | ((drawn == draw) & (users <= user))
        users = np.flatnonzero(kept).astype(np.int64)
        return Cut(users, length[users], column(batch, f"{split}_first")[users].astype(np.int64))

    def sequences(self, batch: pa.RecordBatch, split: str) -> Sequences:
        """The sequences of all users of a range, as the split sees them."""
        offsets, explicit_negatives = batch.column("item").offsets, batch.column("explicit_negatives")
        whole = Sequences(
            raw_users=batch.column("name"),
            offsets=offsets.to_numpy().astype(np.int64),
            item=_values(batch.column("item")),
            timestamp=_values(batch.column("timestamp")),
            rating=_values(batch.column("rating")) if "rating" in batch.schema.names else None,
            explicit_negative_offsets=explicit_negatives.offsets.to_numpy().astype(np.int64),
            explicit_negatives=_values(explicit_negatives),
        )
        return whole if self.cold_path is None or split == "test" else whole.without(load_array(self.cold_path).astype(bool))


@dataclass(frozen=True)
class Count:
    """Counts the rows, targets and training items of a range."""

    reader: RangeReader

    def __call__(self, index: int) -> RangeFacts:
        batch = read_batch(range_path(self.reader.work, index))
        cuts = {split: self.reader.cut(batch, index, split) for split in SPLITS}
        sequences = self.reader.sequences(batch, "train")
        flat = prefix_index(sequences.offsets, cuts["train"].users, cuts["train"].length)
        items, counts = np.unique(sequences.item[flat], return_counts=True)
        return RangeFacts(
            rows={split: len(cut.users) for split, cut in cuts.items()},
            targets={split: cut.num_targets for split, cut in cuts.items()},
            train_items=items.astype(np.int64),
            train_counts=counts.astype(np.int64),
        )


@dataclass(frozen=True)
class ShardJob:
    """Shard `index` of `count`, which holds `rows` of the split. first_rows (P+1,): rows of the split before each range."""

    split: str
    index: int
    count: int
    rows: range
    first_rows: I64


def shard_jobs(rows: dict[str, I64], num_shards: int) -> list[ShardJob]:
    """The jobs for all shards, split by split. rows: ShardJob.first_rows of each split."""
    return [
        ShardJob(name, index, num_shards, part, rows[name])
        for name in SPLITS
        for index, part in enumerate(shard_ranges(int(rows[name][-1]), num_shards))
    ]


@dataclass(frozen=True)
class WriteShard:
    """Writes a shard: gathers its rows from the ranges, one record batch at a time."""

    reader: RangeReader
    folder: Path

    def __call__(self, job: ShardJob) -> FileEntry:
        return write_shard(self.folder / shard_name(job.split, job.index, job.count), self._batches(job))

    def _batches(self, job: ShardJob) -> Iterator[Rows]:
        for rows in batch_ranges(job.rows):
            first = int(np.searchsorted(job.first_rows, rows.start, side="right")) - 1
            last = int(np.searchsorted(job.first_rows, max(rows.stop - 1, rows.start), side="right")) - 1
            last = min(last, len(job.first_rows) - 2)
            pieces = []
            for index in range(min(first, last), last + 1):
                batch, before = read_batch(range_path(self.reader.work, index)), int(job.first_rows[index])
                part = range(max(rows.start - before, 0), max(rows.stop - before, 0))
                cut = self.reader.cut(batch, index, job.split).part(part)
                pieces.append(gather_rows(cut, self.reader.sequences(batch, job.split), int(self.reader.first_users[index])))
            yield _join(pieces)


def _join(pieces: list[Rows]) -> Rows:
    """Joins rows, one piece after another."""

    def joined(name: str) -> I64:
        return np.concatenate([getattr(piece, name) for piece in pieces])

    return Rows(
        users=joined("users"),
        raw_users=pa.concat_arrays([piece.raw_users for piece in pieces]),
        lengths=joined("lengths"),
        item=joined("item"),
        timestamp=joined("timestamp"),
        rating=None if pieces[0].rating is None else np.concatenate([p.rating for p in pieces if p.rating is not None]),
        first_target=joined("first_target"),
        explicit_negative_lengths=joined("explicit_negative_lengths"),
        explicit_negatives=joined("explicit_negatives"),
    )


def _spread(cut: Cut, values: I64, num_users: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The values (R,) of a cut by user (U,), and 0 for users without a row."""
    spread = np.zeros(num_users, dtype=np.int32)
    spread[cut.users] = values
    return spread


def _lists(offsets: I64, values: Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def _values(lists: pa.ListArray) -> Array:
    values: Array = lists.values.to_numpy(zero_copy_only=True)
    return values


def save_cold(work: Path, cold: Bool | None) -> Path | None:
    """Writes the cold items (I,) for all jobs, and returns the file; None without any."""
    if cold is None:
        return None
    path = work / "cold.npy"
    save_array(path, cold)
    return path


def range_path(work: Path, index: int) -> Path:
    """The users of a range, with their sequences and cuts."""
    return work / f"range-{index:06d}.arrow"
