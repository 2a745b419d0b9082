"""The last step: each job writes one shard, whose rows lie in one or several row ranges, and its part of the index.

Memory: one record batch, and the row ranges that it lies in.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.data.dataset.index import index_batch
from rec_dist.data.dataset.manifest import read_arrow
from rec_dist.data.dataset.prepared_data import cache_folder
from rec_dist.data.dataset.schema import SPLITS, shard_name
from rec_dist.data.prepare.blockwise.row_ranges import RangeReader, range_file
from rec_dist.data.prepare.blockwise.scratch import Work, WorkFile, read_batch, whole_or_absent, write_batches
from rec_dist.data.prepare.shards import Rows, batch_ranges, gather_rows, shard_ranges, write_shard
from rec_dist.runtime.arrays import I64
from rec_dist.storage.checksums import FileEntry
from rec_dist.storage.location import Location
from rec_dist.storage.temporary import temporary_folder


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
    """Writes a shard, whose rows it gathers from the ranges one record batch at a time, and the shard's part of the index.

    folder: that of the data set. If the work is at a URI, the shard is made in cache_dir (data.cache_dir) and uploaded.
    """

    reader: RangeReader
    folder: Path
    cache_dir: str | None

    def __call__(self, job: ShardJob) -> FileEntry:
        name, work = shard_name(job.split, job.index, job.count), self.reader.work
        if not work.is_remote:
            with whole_or_absent(self.folder / name, work) as temporary:
                return replace(self._write(temporary, job), name=name)
        with temporary_folder(cache_folder(self.cache_dir), "shard-") as folder:
            entry = self._write(folder / name, job)
            Location(work.place).write(folder / name, name)
        return entry

    def _write(self, path: Path, job: ShardJob) -> FileEntry:
        entry = write_shard(path, self._batches(job))
        write_batches(index_file(self.reader.work, job), [index_batch(read_arrow(path))])
        return entry

    def _batches(self, job: ShardJob) -> Iterator[Rows]:
        held: dict[int, pa.RecordBatch] = {}  # the ranges of one record batch, which may be those of the next
        for rows in batch_ranges(job.rows):
            first = int(np.searchsorted(job.first_rows, rows.start, side="right")) - 1
            last = int(np.searchsorted(job.first_rows, max(rows.stop - 1, rows.start), side="right")) - 1
            last = min(last, len(job.first_rows) - 2)
            indices = range(min(first, last), last + 1)
            held = {index: held.get(index) or read_batch(range_file(self.reader.work, index)) for index in indices}
            pieces = []
            for index, batch in held.items():
                before = int(job.first_rows[index])
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


def index_file(work: Work, job: ShardJob) -> WorkFile:
    """The index of the rows of a shard."""
    return work / f"index-{job.split}-{job.index:06d}.arrow"
