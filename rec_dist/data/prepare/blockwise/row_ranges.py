"""Steps on one row range, whose users are in file order: the split, counts, and the shards.

Letters: U users of a range, N their positives. Memory: about 100 bytes per row of a range; writing a shard holds one record
batch.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.schema import SPLITS
from rec_dist.data.prepare import splits as split_rules
from rec_dist.data.prepare.blockwise.hash_partitions import by_range_file
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
from rec_dist.data.prepare.blockwise.selection import Lowest
from rec_dist.data.prepare.positives import Rows
from rec_dist.data.prepare.sequences import split_sequences
from rec_dist.data.prepare.shards import Sequences, prefix_index
from rec_dist.data.prepare.splits import Cut
from rec_dist.data.sources.interactions import Bool
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class SplitRange:
    """Applies the split to the users of a range, in file order. Returns the smallest few-shot draws (empty if all users train).

    first_users (P+1,): how many users come before each range. cuts: the timestamps for global_temporal. cold: cold items (I,).
    """

    work: Work
    num_partitions: int
    first_users: I64
    config: DataConfig
    cuts: tuple[int, int] | None
    cold: WorkFile | None

    def __call__(self, index: int) -> Lowest:
        parts = [read_batch(by_range_file(self.work, partition), index) for partition in range(self.num_partitions)]
        table = pa.Table.from_batches(parts).combine_chunks()
        table = table.take(pa.array(np.argsort(table["row"].to_numpy(), kind="stable")))
        lists = {name: table[name].combine_chunks() for name in table.schema.names if name not in ("name", "row")}
        item, timestamp = _values(lists["item"]), _values(lists["timestamp"])
        rating = _values(lists["rating"]) if "rating" in lists else None
        row_offsets = lists["item"].offsets.to_numpy().astype(np.int64)
        num_users = len(table)
        user = np.repeat(np.arange(num_users), np.diff(row_offsets))
        every = Rows(user, item.astype(np.int64), timestamp, rating, _values(lists["positive"]).astype(bool))
        names = table["name"].combine_chunks()
        cold = None if self.cold is None else load_array(self.cold).astype(bool)
        whole, split, hashes = split_sequences(every, names, self.config, self.cuts, cold)
        sequences: dict[str, Array] = {"item": whole.item.astype(np.int32), "timestamp": whole.timestamp}
        sequences |= {} if whole.rating is None else {"rating": whole.rating}
        columns = {name: _lists(whole.offsets, values) for name, values in sequences.items()}
        columns["name"] = names
        columns["explicit_negatives"] = _lists(whole.explicit_negative_offsets, whole.explicit_negatives.astype(np.int32))
        for name, cut in zip(SPLITS, (split.train, split.valid, split.test), strict=True):
            columns |= {f"{name}_length": _spread(cut, cut.length, num_users)}
            columns |= {f"{name}_first": _spread(cut, cut.first_target, num_users)}
        draw = split_rules.few_shot_draw(hashes)
        write_batches(range_file(self.work, index), [columns | {"draw": draw}])
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

    cold: the cold items (I,), which the train and valid splits leave out; None without any.
    """

    work: Work
    first_users: I64
    last: tuple[float, int] | None
    cold: WorkFile | None

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
        return whole if self.cold is None or split == "test" else whole.without(load_array(self.cold).astype(bool))


@dataclass(frozen=True)
class Count:
    """Counts the rows, targets and training items of a range."""

    reader: RangeReader

    def __call__(self, index: int) -> RangeFacts:
        batch = read_batch(range_file(self.reader.work, index))
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


def save_cold(work: Work, cold: Bool | None) -> WorkFile | None:
    """Writes the cold items (I,) for all jobs, and returns the file; None without any."""
    if cold is None:
        return None
    file = work / "cold.npy"
    save_array(file, cold)
    return file


def range_file(work: Work, index: int) -> WorkFile:
    """The users of a range, with their sequences and cuts."""
    return work / f"range-{index:06d}.arrow"
