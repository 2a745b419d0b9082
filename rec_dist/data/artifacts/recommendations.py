"""Recommendations as tables: their columns, the parts that a ranking leaves on its way, and the files that it ends in.

A part is an Arrow file of some neighbouring users, START-STOP.arrow, written whole or not at all. The parts in their order are
the output. Joining them holds one row group at a time.

Some rankings have columns behind those of SCHEMA, such as what a search says of itself.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rec_dist.runtime.arrays import F64, I32, I64
from rec_dist.runtime.messages import visible_json
from rec_dist.storage.files import atomic_path

RecordBatch: TypeAlias = pa.RecordBatch  # for modules that may not import pyarrow
OUTPUT_SUFFIXES = (".parquet", ".arrow", ".jsonl")
SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("fallback", pa.bool_(), nullable=False),
    ]
)
_PART = re.compile(r"(\d{12})-(\d{12})\.arrow")
_COUNTS = b"counts"
_ROW_GROUP = 1 << 18  # rows


class ItemColumns:
    """The ids and titles of a catalogue as columns to take rows from."""

    def __init__(self, raw_items: Sequence[str], titles: Sequence[str]) -> None:
        self._raw, self._titles = pa.array(raw_items, pa.string()), pa.array(titles, pa.string())

    def batch(
        self,
        users: Sequence[str],
        user: I64,
        rank: I32,
        item: I32,
        score: F64,
        fallback: npt.NDArray[np.bool_],
        more: Mapping[str, npt.NDArray[Any]],
    ) -> RecordBatch:
        """N rows: users[user[n]], rank, item, score, fallback and further columns (N,) each. A NaN in those is no value."""
        items = pa.array(item)
        columns = [
            pa.array(users, pa.string()).take(pa.array(user)),
            pa.array(rank),
            self._raw.take(items),
            self._titles.take(items),
            pa.array(score),
            pa.array(fallback),
        ]
        others = {name: pa.array(values, from_pandas=True) for name, values in more.items()}
        fields = [pa.field(name, values.type) for name, values in others.items()]
        return pa.record_batch([*columns, *others.values()], schema=pa.schema([*SCHEMA, *fields]))


class Part(NamedTuple):
    """A part on disk: users start..stop - 1."""

    start: int
    stop: int
    path: Path


def write_part(folder: Path, start: int, stop: int, batches: Sequence[RecordBatch], counts: dict[str, int]) -> None:
    """Writes a part of at least one batch into `folder`, with counts that describe it."""
    schema = batches[0].schema.with_metadata({_COUNTS: json.dumps(counts).encode()})
    with (
        atomic_path(folder / f"{start:012d}-{stop:012d}.arrow") as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def parts_in(folder: Path) -> list[Part]:
    """The parts in `folder` from user 0 on, as far as they follow one another without a gap."""
    found = [(match, path) for path in folder.glob("*.arrow") if (match := _PART.fullmatch(path.name))]
    parts, at = [], 0
    for part in sorted(Part(int(match[1]), int(match[2]), path) for match, path in found):
        if part.start == at:
            parts.append(part)
            at = part.stop
    return parts


def counts_of(part: Part) -> dict[str, int] | None:
    """The counts that write_part took; None if the part is damaged."""
    try:
        with pa.OSFile(str(part.path)) as file:
            counts: dict[str, int] = json.loads(pa.ipc.open_file(file).schema.metadata[_COUNTS])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
    return counts


def _batches(parts: Sequence[Part]) -> Iterator[pa.RecordBatch]:
    for part in parts:
        with pa.memory_map(str(part.path)) as mapped:
            reader = pa.ipc.open_file(mapped)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number).replace_schema_metadata(None)


def _schema(batches: Iterator[RecordBatch]) -> pa.Schema:
    """That of the first batch; all have the same. SCHEMA without any."""
    return next((batch.schema for batch in batches), SCHEMA)


def _row_groups(parts: Sequence[Part]) -> Iterator[list[RecordBatch]]:
    """The batches in groups of about _ROW_GROUP rows, which do not depend on where parts end."""
    group: list[RecordBatch] = []
    for batch in _batches(parts):
        group.append(batch)
        if sum(len(one) for one in group) >= _ROW_GROUP:
            yield group
            group = []
    if group:
        yield group


def join_parts(parts: Sequence[Part], output: Path, *, joined: Callable[[Path], None]) -> None:
    """Writes the rows of all parts to `output`, whole or not at all. Its suffix, one of OUTPUT_SUFFIXES, is its format.

    joined: called with the finished file just before it gets its name.
    """
    schema = _schema(_batches(parts))
    with atomic_path(output) as temporary:
        if output.suffix == ".parquet":
            with pq.ParquetWriter(str(temporary), schema, compression="zstd") as writer:
                for group in _row_groups(parts):
                    writer.write_table(pa.Table.from_batches(group, schema=schema))
        elif output.suffix == ".arrow":
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in _batches(parts):
                    writer.write_batch(batch)
        else:
            with temporary.open("w", encoding="utf-8") as file:
                for batch in _batches(parts):
                    write_lines(batch, file)
        joined(temporary)


def write_lines(batch: RecordBatch, file: TextIO) -> None:
    """Writes a JSON object for each row of a batch. A score that is not finite is null, since JSON has no word for it."""
    for row in batch.to_pylist():
        finite = {name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in row.items()}
        file.write(visible_json(json.dumps(finite, ensure_ascii=False, allow_nan=False)) + "\n")


def table_of(batches: Sequence[RecordBatch]) -> pa.Table:
    """The batches as one Arrow table."""
    return pa.Table.from_batches(batches, schema=_schema(iter(batches)))
