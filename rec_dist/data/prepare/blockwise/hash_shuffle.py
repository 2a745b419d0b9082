"""The first step: reads each block of the source once and distributes its rows over partitions by a hash of the user.

All rows of a user are in one partition, so ordering, repeats and counts per user need only that partition. Cost: about 60 bytes
of disk per row, one file per block; the memory of one block.
"""

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa

from rec_dist.data.prepare.blockwise.scratch import (
    Work,
    WorkFile,
    column,
    find_array,
    load_array,
    read_batch,
    save_array,
    write_batches,
)
from rec_dist.data.sources.assemble import RowBlock, in_use
from rec_dist.data.sources.blocks import Block
from rec_dist.data.sources.interactions import F32, KnownItems
from rec_dist.data.sources.source import RowReader
from rec_dist.data.sources.times import scaled
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class BlockReport:
    """What the driver needs to know about a block. rows: the block without its rows. used: items of the items file in it."""

    index: int
    block: Block
    num_rows: int
    rows: RowBlock
    used: I64
    has_rating: bool
    has_timestamp: bool


@dataclass(frozen=True)
class HashShuffle:
    """Reads a block and writes rows-NNNNNN.arrow, a record batch per partition.

    known: the names in the items file, or None.
    """

    reader: RowReader
    known: WorkFile | None
    work: Work
    num_partitions: int

    def __call__(self, job: tuple[int, Block]) -> BlockReport:
        index, block = job
        rows = self.reader.read(block, None if self.known is None else known_items(self.known))
        write_batches(rows_file(self.work, index), self._parts(rows))
        return BlockReport(
            index=index,
            block=block,
            num_rows=len(rows),
            rows=_without_rows(rows),
            used=np.unique(rows.item) if rows.items is None else np.zeros(0, dtype=np.int64),
            has_rating=rows.rating is not None,
            has_timestamp=rows.timestamp is not None,
        )

    def _parts(self, rows: RowBlock) -> list[dict[str, object]]:
        hashes = [zlib.crc32(name.encode()) % self.num_partitions for name in rows.users.to_pylist()]
        partition = np.array(hashes, dtype=np.int32)[rows.user]
        order = np.argsort(partition, kind="stable")
        edges = np.searchsorted(partition[order], np.arange(self.num_partitions + 1))
        parts = []
        for begin, end in pairwise(edges.tolist()):
            at = order[begin:end]
            user, named = in_use(rows.user[at])
            names = rows.users.take(pa.array(named))
            columns = {
                "user": pa.DictionaryArray.from_arrays(pa.array(user.astype(np.int32)), names).dictionary_decode(),
                "item": rows.item[at].astype(np.int32),
                "row": at.astype(np.int32),
            }
            columns |= {} if rows.rating is None else {"rating": rows.rating[at]}
            columns |= {} if rows.timestamp is None else {"timestamp": rows.timestamp[at]}
            columns |= {} if rows.fraction is None else {"fraction": rows.fraction[at]}
            parts.append(columns)
        return parts


@dataclass(frozen=True)
class PartitionRows:
    """All rows (R,) of one partition in file order, without those of items that have no title.

    user: an index into raw_users, which are in the order of their first row. item: the number among items with distinct titles.
    row: the place among all rows of the source.
    """

    user: I64
    raw_users: pa.Array
    item: I64
    row: I64
    rating: F32 | None
    timestamp: I64 | None


def read_partition(work: Work, partition: int, first_rows: I64, digits: int) -> PartitionRows:
    """Reads the rows of a partition from the files of all blocks.

    first_rows (B+1,): rows of the source before each block. digits: the timestamps' unit is 10**-digits of the source's.
    """
    parts = [read_batch(rows_file(work, index), partition) for index in range(len(first_rows) - 1)]
    titles = load_array(titles_file(work))
    items: list[I64] = []
    rows: list[I64] = []
    times: list[I64] = []
    for index, part in enumerate(parts):
        item = part.column("item").to_numpy()
        among_all = find_array(items_file(work, index))
        item = titles[item if among_all is None else among_all[item]]
        if (item < 0).any():
            part, item = part.filter(pa.array(item >= 0)), item[item >= 0]
        parts[index] = part
        items.append(item)
        rows.append(part.column("row").to_numpy().astype(np.int64) + first_rows[index])
        if "timestamp" in part.schema.names:
            fraction = part.column("fraction").to_numpy() if "fraction" in part.schema.names else None
            times.append(scaled(part.column("timestamp").to_numpy(), fraction, digits))
    names = pa.chunked_array([part.column("user") for part in parts], pa.string()).dictionary_encode().combine_chunks()
    if isinstance(names, pa.ChunkedArray):  # without rows there is no chunk to combine
        names = pa.array([], pa.string()).dictionary_encode()
    rated = "rating" in parts[0].schema.names
    return PartitionRows(
        user=names.indices.to_numpy().astype(np.int64),
        raw_users=names.dictionary,
        item=np.concatenate(items),
        row=np.concatenate(rows),
        rating=np.concatenate([part.column("rating").to_numpy() for part in parts]) if rated else None,
        timestamp=np.concatenate(times) if times else None,
    )


def save_known(file: WorkFile, known: KnownItems) -> None:
    """Saves what readers need of the items file for HashShuffle."""
    write_batches(file, [{"name": known.names, "titled": known.titled}])


def save_item_index(work: Work, index: int, items: I64 | None) -> None:
    """Saves the place of a block's items among all items; nothing if the items file numbers them already."""
    if items is not None:
        save_array(items_file(work, index), items)


def rows_file(work: Work, index: int) -> WorkFile:
    """The rows of a block, by partition."""
    return work / f"rows-{index:06d}.arrow"


def items_file(work: Work, index: int) -> WorkFile:
    """The item index of a block."""
    return work / f"items-{index:06d}.npy"


def titles_file(work: Work) -> WorkFile:
    """The number of the distinct title of each item."""
    return work / "titles.npy"


@lru_cache(maxsize=1)
def known_items(file: WorkFile) -> KnownItems:
    """What save_known wrote, read once per process and attempt."""
    batch = read_batch(file)
    return KnownItems(batch.column("name"), column(batch, "titled").astype(bool))


def _without_rows(rows: RowBlock) -> RowBlock:
    empty = np.zeros(0, dtype=np.int64)
    return replace(rows, user=empty, users=pa.array([], pa.string()), item=empty, rating=None, timestamp=None, fraction=None)
