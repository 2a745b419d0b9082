"""Blocks of users as Arrow tables, and their recommendations as bytes: how they travel to other processes and back."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rec_dist.data.artifacts.recommendations import RecordBatch
from rec_dist.runtime.arrays import I32

_SCHEMA = pa.schema(
    [
        pa.field("block", pa.int64()),
        pa.field("unknown", pa.int64()),
        pa.field("user", pa.string()),
        pa.field("history", pa.list_(pa.int32())),
        pa.field("candidates", pa.list_(pa.int32())),
    ]
)


class TravellingUsers(NamedTuple):
    """A block of users by its number. unknown, histories: as in UserBlock. candidates: of each user, None for none."""

    number: int
    unknown: int
    users: list[str]
    histories: list[I32]
    candidates: list[I32 | None]


def table_of_users(block: TravellingUsers) -> Any:
    """The pyarrow.Table of a block, a row a user."""
    num = len(block.users)
    lists = [pa.array(each, type=pa.list_(pa.int32())) for each in (block.histories, block.candidates)]
    numbers = [pa.array(np.full(num, value), pa.int64()) for value in (block.number, block.unknown)]
    return pa.table([*numbers, pa.array(block.users, pa.string()), *lists], schema=_SCHEMA)


def users_of_table(table: Any) -> TravellingUsers:
    """The block that became a table."""
    (number,), (unknown,) = (table[name].unique().to_pylist() for name in ("block", "unknown"))
    histories, candidates = (_lists(table[name].combine_chunks()) for name in ("history", "candidates"))
    known = [np.empty(0, dtype=np.int32) if items is None else items for items in histories]
    return TravellingUsers(number, unknown, table["user"].to_pylist(), known, candidates)


def _lists(column: Any) -> list[Any]:
    return [None if row.values is None else row.values.to_numpy(zero_copy_only=False).astype(np.int32) for row in column]


def bytes_of(batch: RecordBatch) -> bytes:
    """A batch of recommendations for its way to another process."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def batch_of(data: bytes) -> RecordBatch:
    """The batch that became bytes."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_next_batch()
