"""Writes items.arrow and the shards of the splits: one record batch a shard, so that a reader gets each column without a copy."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.data.index import write_index
from rec_dist.data.interactions import F32, ItemTable
from rec_dist.data.manifest import FileEntry, SplitEntry, describe_file
from rec_dist.data.schema import ITEM_SCHEMA, ITEMS_NAME, SEQUENCE_SCHEMA, shard_name
from rec_dist.data.splits import Cut
from rec_dist.runtime.errors import UserError
from rec_dist.stream.trunk import I64

_MAX_LIST_VALUES = 2**31 - 1  # list<int32> has 32-bit offsets


@dataclass(frozen=True)
class Sequences:
    """All users' choices: offsets (U+1,) into item, timestamp, rating (N,); disliked_offsets (U+1,) into disliked (D,)."""

    raw_users: list[str]
    offsets: I64
    item: I64
    timestamp: I64
    rating: F32 | None
    disliked_offsets: I64
    disliked: I64


def prefix_index(offsets: I64, users: I64, length: I64) -> tuple[I64, I64]:
    """Where the first length (R,) entries of each of `users` (R,) lie: (row offsets (R+1,), flat index (sum of length,))."""
    row_offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(length)]).astype(np.int64)
    shift = np.repeat(offsets[users] - row_offsets[:-1], length)
    return row_offsets, np.arange(row_offsets[-1], dtype=np.int64) + shift


def write_split(folder: Path, split: str, cut: Cut, sequences: Sequences, num_shards: int) -> SplitEntry:
    """Writes the rows of one split, in user order, spread evenly over num_shards files (some may be empty), and their index."""
    shards = []
    for index, rows in enumerate(np.array_split(np.arange(len(cut.users)), num_shards)):
        part = Cut(cut.users[rows], cut.length[rows], cut.first_target[rows])
        path = folder / shard_name(split, index, num_shards)
        _write(path, _table(part, sequences))
        shards.append(describe_file(path, len(rows)))
    return SplitEntry(len(cut.users), cut.num_targets, shards, write_index(folder, split, shards))


def write_items(folder: Path, items: ItemTable, train_count: I64) -> FileEntry:
    """Writes items.arrow; row i is item i, train_count (I,)."""
    columns = [np.arange(len(items), dtype=np.int32), items.raw, items.titles, items.categories, train_count]
    arrays = [pa.array(values, type=kind) for values, kind in zip(columns, ITEM_SCHEMA.types, strict=True)]
    path = folder / ITEMS_NAME
    _write(path, pa.Table.from_arrays(arrays, schema=ITEM_SCHEMA))
    return describe_file(path, len(items))


def _table(cut: Cut, sequences: Sequences) -> pa.Table:
    row_offsets, flat = prefix_index(sequences.offsets, cut.users, cut.length)
    dislikes = sequences.disliked_offsets[cut.users + 1] - sequences.disliked_offsets[cut.users]
    dislike_offsets, dislike_flat = prefix_index(sequences.disliked_offsets, cut.users, dislikes)
    if max(row_offsets[-1], dislike_offsets[-1]) > _MAX_LIST_VALUES:
        raise UserError(
            f"data.num_shards is too small: a shard would hold {row_offsets[-1]} items, the limit is {_MAX_LIST_VALUES}."
        )
    if sequences.rating is None:
        ratings = pa.nulls(len(cut.users), pa.list_(pa.float32()))
    else:
        ratings = _lists(row_offsets, sequences.rating[flat], pa.float32())
    arrays = [
        pa.array(cut.users, pa.int64()),
        pa.array([sequences.raw_users[user] for user in cut.users.tolist()], pa.string()),
        _lists(row_offsets, sequences.item[flat], pa.int32()),
        ratings,
        _lists(row_offsets, sequences.timestamp[flat], pa.int64()),
        pa.array(cut.first_target, pa.int32()),
        _lists(dislike_offsets, sequences.disliked[dislike_flat], pa.int32()),
    ]
    return pa.Table.from_arrays(arrays, schema=SEQUENCE_SCHEMA)


def _lists(offsets: I64, values: I64 | F32, kind: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))


def _write(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with path.open("rb") as written:
        os.fsync(written.fileno())
