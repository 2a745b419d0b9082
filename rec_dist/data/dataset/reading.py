"""Checked, memory-mapped tables of a prepared data set, and the shards of a split, each opened when a row of it is requested.

The rows of a step are spread over many shards. Shards that are not open yet are fetched eight at a time. An open shard stays
mapped, and the page cache decides which pages are in memory. Shards that the node's cache has removed are unmapped before the
next fetch. Letters: R requested rows, S shards.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rec_dist.data.dataset.index import SplitIndex, flat, index_of_shard
from rec_dist.data.dataset.manifest import read_arrow
from rec_dist.data.dataset.node_cache import NodeCache
from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.dataset.schema import PREPARE_AGAIN, SEQUENCE_SCHEMA
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import F32, I32, I64
from rec_dist.storage.checksums import FileEntry
from rec_dist.storage.location import Location

_AT_ONCE = 8  # shards to fetch at once; a single request does not saturate a node's network
_TOUCH_SECONDS = 30.0  # how often to mark a file as used, which decides what the cache evicts


@dataclass(frozen=True)
class Source:
    """The place of a prepared data set, and the cache through which this node reads it."""

    location: Location
    cache: NodeCache

    def table(self, entry: FileEntry, schema: pa.Schema) -> tuple[pa.Table, Path]:
        """Maps a file of the data set and returns its table and path. Raises UserError if the file differs from the manifest."""
        with self.cache.opened(self.location, entry) as path:
            table = read_arrow(path)
        fault = table_fault(table, entry, schema)
        if fault:
            raise UserError(f"{self.location.name(entry.name)}: {fault}; {PREPARE_AGAIN}")
        return table, path


def table_fault(table: pa.Table, entry: FileEntry, schema: pa.Schema) -> str | None:
    """Says how the columns or the number of rows of a table differ from what they should be, or returns None."""
    if not table.schema.equals(schema):
        return f"the columns are {table.schema.names}, and their names or types differ from the schema {schema.names}"
    return f"{table.num_rows} rows instead of {entry.rows}" if table.num_rows != entry.rows else None


@dataclass
class _Open:
    """One open shard: flat views of the columns of all its rows, and when it was last marked as used. ratings: None without any."""

    items: I32
    ratings: F32 | None
    timestamps: I64
    explicit_negatives: I32
    raw_users: pa.ChunkedArray
    path: Path
    touched: float


class Shards:
    """Gives access to the rows of a split by their numbers. Thread-safe."""

    def __init__(self, source: Source, entries: Sequence[FileEntry], index: SplitIndex) -> None:
        self._source, self._entries, self._index = source, entries, index
        self._first = offsets_of(np.asarray([entry.rows for entry in entries], dtype=np.int64))  # (S+1,) rows
        self._open: dict[int, _Open] = {}
        self._lock = threading.Lock()

    @property
    def num_open(self) -> int:
        """How many shards are mapped now."""
        return len(self._open)

    def items(self, rows: I64, counts: I64) -> I32:
        """The first counts (R,) items of rows (R,), one row after another."""
        shards = np.searchsorted(self._first, rows, side="right") - 1
        starts = self._index.offsets[rows] - self._index.offsets[self._first[shards]]  # (R,) within their shards
        used, offsets = np.unique(shards), offsets_of(counts)
        if len(used) == 1:
            return self._get(used)[0].items[runs(starts, counts)]
        out = np.empty(offsets[-1], dtype=np.int32)
        for first in range(0, len(used), _AT_ONCE):  # so only these few can be mapped beyond what the cache holds
            some = used[first : first + _AT_ONCE]
            for shard, opened in zip(some.tolist(), self._get(some), strict=True):
                here = np.flatnonzero(shards == shard)
                out[runs(offsets[here], counts[here])] = opened.items[runs(starts[here], counts[here])]
        return out

    def items_of(self, row: int) -> I32:
        """A view of the items of one row."""
        shard, offsets = self._shard_of(row), self._index.offsets
        base = offsets[self._first[shard]]
        return self._one(shard).items[offsets[row] - base : offsets[row + 1] - base]

    def ratings_of(self, row: int) -> F32 | None:
        """A view of the ratings of one row's items, None without ratings."""
        shard, offsets = self._shard_of(row), self._index.offsets
        base, ratings = offsets[self._first[shard]], self._one(shard).ratings
        return None if ratings is None else ratings[offsets[row] - base : offsets[row + 1] - base]

    def timestamps_of(self, row: int) -> I64:
        """A view of the timestamps of one row's items."""
        shard, offsets = self._shard_of(row), self._index.offsets
        base = offsets[self._first[shard]]
        return self._one(shard).timestamps[offsets[row] - base : offsets[row + 1] - base]

    def explicit_negatives_of(self, row: int) -> I32:
        """A view of the explicit negatives of one row."""
        shard, offsets = self._shard_of(row), self._index.explicit_negative_offsets
        base = offsets[self._first[shard]]
        return self._one(shard).explicit_negatives[offsets[row] - base : offsets[row + 1] - base]

    def raw_user(self, row: int) -> str:
        """The name of the user of one row in the source."""
        shard = self._shard_of(row)
        return str(self._one(shard).raw_users[row - int(self._first[shard])].as_py())

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self._first, row, side="right")) - 1

    def _one(self, shard: int) -> _Open:
        return self._get(np.asarray([shard]))[0]

    def _get(self, shards: npt.NDArray[np.int64]) -> list[_Open]:
        with self._lock:
            wanted = shards.tolist()
            missing = [shard for shard in wanted if shard not in self._open]
            if missing:
                self._let_go(set(wanted))
                with ThreadPoolExecutor(min(_AT_ONCE, len(missing))) as pool:
                    self._open.update(zip(missing, pool.map(self._read, missing), strict=True))
            found = [self._open[shard] for shard in wanted]
        if self._source.location.is_remote:
            now = time.monotonic()
            for opened in found:
                if now - opened.touched > _TOUCH_SECONDS:
                    NodeCache.touch(opened.path)
                    opened.touched = now
        return found

    def _let_go(self, wanted: set[int]) -> None:
        """Unmaps shards that the cache has removed, so that the disk space is freed, except those in `wanted`."""
        if self._source.location.is_remote:
            self._open = {shard: kept for shard, kept in self._open.items() if shard in wanted or kept.path.exists()}

    def _read(self, shard: int) -> _Open:
        entry = self._entries[shard]
        table, path = self._source.table(entry, SEQUENCE_SCHEMA)
        if self._index.disagrees(int(self._first[shard]), int(self._first[shard + 1]), index_of_shard(table)):
            raise UserError(
                f"{self._source.location.name(entry.name)}: its rows disagree with the split's index; {PREPARE_AGAIN}"
            )
        items, explicit_negatives = (
            flat([part.flatten() for part in table[name].chunks], np.int32) for name in ("items", "explicit_negatives")
        )
        rated = table["ratings"].null_count == 0
        ratings = flat([part.flatten() for part in table["ratings"].chunks], np.float32) if rated else None
        timestamps = flat([part.flatten() for part in table["timestamps"].chunks], np.int64)
        return _Open(items, ratings, timestamps, explicit_negatives, table["raw_user"], path, time.monotonic())
