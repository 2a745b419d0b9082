"""Writes items.arrow and the shards of the splits.

A shard is a series of record batches of BATCH_ROWS users. A writer holds one batch at a time, and a shard with a single batch
is read without a copy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.data.dataset.index import index_batch, write_index
from rec_dist.data.dataset.manifest import SplitEntry, read_arrow
from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.dataset.schema import ITEM_SCHEMA, ITEMS_NAME, SEQUENCE_SCHEMA, shard_name
from rec_dist.data.prepare.splits import Cut
from rec_dist.data.sources.interactions import F32, Bool, ItemTable
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I64
from rec_dist.storage.checksums import FileEntry, describe
from rec_dist.storage.files import sync

BATCH_ROWS = 1 << 15
_MAX_LIST_VALUES = 2**31 - 1  # list<int32> has 32-bit offsets


@dataclass(frozen=True)
class Sequences:
    """The positives of all users: offsets (U+1,) into item, timestamp, rating (N,).

    explicit_negative_offsets (U+1,) into explicit_negatives (E,); raw_users: Arrow strings (U,).
    """

    raw_users: pa.Array
    offsets: I64
    item: I64
    timestamp: I64
    rating: F32 | None
    explicit_negative_offsets: I64
    explicit_negatives: I64

    def without(self, cold: Bool) -> "Sequences":
        """The sequences, and the explicit negatives, without the items for which cold (I,) is true."""
        kept, used = ~cold[self.item], ~cold[self.explicit_negatives]
        return Sequences(
            raw_users=self.raw_users,
            offsets=offsets_of(kept.astype(np.int64))[self.offsets],
            item=self.item[kept],
            timestamp=self.timestamp[kept],
            rating=None if self.rating is None else self.rating[kept],
            explicit_negative_offsets=offsets_of(used.astype(np.int64))[self.explicit_negative_offsets],
            explicit_negatives=self.explicit_negatives[used],
        )


@dataclass(frozen=True)
class Rows:
    """Rows (R,) of a split, ready to write: the prefixes of users in flat arrays, with their lengths (R,)."""

    users: I64
    raw_users: pa.Array
    lengths: I64
    item: I64
    timestamp: I64
    rating: F32 | None
    first_target: I64
    explicit_negative_lengths: I64
    explicit_negatives: I64


def prefix_index(offsets: I64, users: I64, length: I64) -> I64:
    """The flat index (sum of length,) of the first length (R,) entries of each of `users` (R,)."""
    return runs(offsets[users], length)


def gather_rows(cut: Cut, sequences: Sequences, first_user: int = 0) -> Rows:
    """Gathers the rows of a cut. first_user: the number in the data set of the first user of `sequences`."""
    flat = prefix_index(sequences.offsets, cut.users, cut.length)
    explicit_negatives = sequences.explicit_negative_offsets[cut.users + 1] - sequences.explicit_negative_offsets[cut.users]
    return Rows(
        users=cut.users + first_user,
        raw_users=sequences.raw_users.take(pa.array(cut.users)),
        lengths=cut.length,
        item=sequences.item[flat],
        timestamp=sequences.timestamp[flat],
        rating=None if sequences.rating is None else sequences.rating[flat],
        first_target=cut.first_target,
        explicit_negative_lengths=explicit_negatives,
        explicit_negatives=sequences.explicit_negatives[
            prefix_index(sequences.explicit_negative_offsets, cut.users, explicit_negatives)
        ],
    )


def shard_ranges(num_rows: int, num_shards: int) -> list[range]:
    """Distributes rows 0..num_rows-1 evenly over the shards. Some shards are empty if there are fewer rows than shards."""
    size, larger = divmod(num_rows, num_shards)
    starts = [index * size + min(index, larger) for index in range(num_shards + 1)]
    return [range(begin, end) for begin, end in pairwise(starts)]


def batch_ranges(rows: range) -> list[range]:
    """Cuts the rows of one shard into batches; an empty shard has one empty batch."""
    return [rows[begin : begin + BATCH_ROWS] for begin in range(0, max(len(rows), 1), BATCH_ROWS)]


def write_split(folder: Path, split: str, cut: Cut, sequences: Sequences, num_shards: int) -> SplitEntry:
    """Writes the rows of one split in user order, distributed evenly over num_shards files, and their index."""
    shards = []
    for index, rows in enumerate(shard_ranges(len(cut.users), num_shards)):
        batches = (gather_rows(cut.part(batch), sequences) for batch in batch_ranges(rows))
        shards.append(write_shard(folder / shard_name(split, index, num_shards), batches))
    written = write_index(folder, split, (index_batch(read_arrow(folder / shard.name)) for shard in shards))
    return SplitEntry(len(cut.users), cut.num_targets, shards, written)


def write_shard(path: Path, batches: Iterable[Rows]) -> FileEntry:
    """Writes one shard, a record batch of at most BATCH_ROWS rows at a time."""
    num_rows = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SEQUENCE_SCHEMA) as writer:
        for rows in batches:
            writer.write_batch(_batch(rows))
            num_rows += len(rows.users)
    sync(path)  # here, since a job may run on another machine than the rename of the folder
    return describe(path, num_rows)


def write_items(folder: Path, items: ItemTable, train_count: I64) -> FileEntry:
    """Writes items.arrow; row i is item i. train_count (I,)."""
    columns = [np.arange(len(items), dtype=np.int32), items.raw, items.titles, items.categories, train_count]
    arrays = [pa.array(values, type=kind) for values, kind in zip(columns, ITEM_SCHEMA.types, strict=True)]
    path = folder / ITEMS_NAME
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ITEM_SCHEMA) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=ITEM_SCHEMA))
    return describe(path, len(items))


def _batch(rows: Rows) -> pa.RecordBatch:
    if max(len(rows.item), len(rows.explicit_negatives)) > _MAX_LIST_VALUES:
        raise UserError(
            f"data.source: {len(rows.users)} users have {len(rows.item)} positives, more than a record batch holds "
            f"({_MAX_LIST_VALUES}); leave out accounts that are not single users (crawlers, shared accounts)."
        )
    if rows.rating is None:
        ratings = pa.nulls(len(rows.users), pa.list_(pa.float32()))
    else:
        ratings = _lists(rows.lengths, rows.rating, pa.float32())
    arrays = [
        pa.array(rows.users, pa.int64()),
        rows.raw_users,
        _lists(rows.lengths, rows.item, pa.int32()),
        ratings,
        _lists(rows.lengths, rows.timestamp, pa.int64()),
        pa.array(rows.first_target, pa.int32()),
        _lists(rows.explicit_negative_lengths, rows.explicit_negatives, pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SEQUENCE_SCHEMA)


def _lists(lengths: I64, values: I64 | F32, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets_of(lengths), pa.int32()), pa.array(values, kind))
