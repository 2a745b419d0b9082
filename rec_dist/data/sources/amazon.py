"""Amazon Reviews 2018 and 2023: one review per line of JSON, and the titles of products in a file `meta_NAME` beside it.

The fields are reviewerID, asin, overall, unixReviewTime (seconds) in 2018, and user_id, parent_asin, rating, timestamp
(milliseconds) in 2023. Cost: Arrow's JSON parser reads about 100 MB/s. A block with an invalid line is read line by line, 20
times slower.
"""

import gzip
import html
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from rec_dist.data.sources.assemble import Roles, RowBlock, assemble
from rec_dist.data.sources.blocks import (
    GZIP_FAULTS,
    Block,
    cut_text,
    files_of,
    first_bytes,
    is_packed,
    kind_of,
    read_buffer,
    whole,
)
from rec_dist.data.sources.interactions import BadRows, ItemTable
from rec_dist.data.sources.source import Source
from rec_dist.data.sources.table import Table
from rec_dist.errors import UserError

SUFFIXES = (".json", ".jsonl")
META = "meta_"
_BYTES_A_ROW = 400
_META_CHUNK = 1 << 26
_LONGEST_REVIEW = 1 << 24  # bytes of a line; the text of a review can be longer than 64 KiB


@dataclass(frozen=True)
class _Edition:
    """The field names of one edition: those of a review, and the key and categories of a product."""

    roles: Roles
    key: str
    categories: str


_EDITIONS = (
    _Edition(Roles("reviewerID", "asin", "overall", "unixReviewTime"), "asin", "category"),
    _Edition(Roles("user_id", "parent_asin", "rating", "timestamp"), "parent_asin", "categories"),
)


@dataclass(frozen=True)
class JsonRows:
    """Implements RowReader for lines of JSON objects. Ignores fields that have no role."""

    roles: Roles
    items_path: Path | None

    def read(self, block: Block, known: pa.Array | None) -> RowBlock:
        """Reads the rows of a block of lines."""
        bad = BadRows(block.file)
        types = {self.roles.user: pa.string(), self.roles.item: pa.string()}
        for number, kind in ((self.roles.rating, pa.float64()), (self.roles.timestamp, pa.int64())):
            types |= {number: kind} if number is not None else {}
        data = read_buffer(block.data, block.begin, block.end)
        return assemble(read_json(data, block.path, pa.schema(types.items()), bad), self.roles, bad, known, self.items_path)

    def cut(self, block: Block, size: int) -> list[Block]:
        """Cuts a file into blocks of whole lines of four times `size`, since lines are longer than rows of delimited text."""
        return cut_text(block, quoted_after=None, size=4 * size)

    def num_rows(self, block: Block) -> int:
        """An estimate from the size of the file."""
        return block.data.stat().st_size // _BYTES_A_ROW + 1


def open_amazon(reviews: Path, meta: Path | None) -> Source:
    """Opens a file of reviews of either edition and its metadata. A review of a product without a title is a bad row.

    Raises UserError if the first line belongs to neither edition.
    """
    edition = _edition(reviews)
    notes: list[str] = []
    items = None
    if meta is None:
        notes.append(f"{META}{reviews.name} does not exist: raw item names are used as titles")
    else:
        items = _read_meta(meta, edition, notes)
    return Source([whole(0, reviews)], JsonRows(edition.roles, meta), items=items, notes=notes)


def find_amazon(source: Path) -> list[Path]:
    """Finds the file of reviews and, if it is beside it, the file of metadata. Returns nothing if there are no reviews."""
    found = [path for path in files_of(source) if kind_of(path) in SUFFIXES and not path.name.startswith(META)]
    if not found:
        return []
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise UserError(
            f"data.source ({source}) holds {len(found)} .json or .jsonl files ({names}); name one of them instead of the folder."
        )
    stem = found[0].name.split(".")[0]
    for name in (stem, stem.removesuffix("_5")):  # the 5-core of 2018 shares the metadata of the full data set
        for suffix in (f"{kind}{packed}" for kind in SUFFIXES for packed in ("", ".gz")):
            meta = found[0].with_name(f"{META}{name}{suffix}")
            if meta.is_file():
                return [found[0], meta]
    return found


def _edition(path: Path) -> _Edition:
    line = first_bytes(path, _LONGEST_REVIEW).split(b"\n", 1)[0]
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        for edition in _EDITIONS:
            if edition.roles.user in fields and edition.roles.item in fields:
                return edition
    wanted = " or ".join(f"{edition.roles.user} and {edition.roles.item}" for edition in _EDITIONS)
    raise UserError(
        f"{path}:1: this is not a review of Amazon Reviews 2018 or 2023; each line must be a JSON object with {wanted}."
    )


def _read_meta(path: Path, edition: _Edition, notes: list[str]) -> ItemTable:
    """Reads the products with a title, each from its first line, and notes how many others there are."""
    schema = pa.schema({edition.key: pa.string(), "title": pa.string(), edition.categories: pa.list_(pa.string())}.items())
    table = ItemTable([], [], [], [])
    seen: set[str] = set()
    bad = BadRows(file=1)
    repeated = untitled = 0
    for chunk in _line_chunks(path):
        read = read_json(pa.py_buffer(chunk), path, schema, bad)
        for raw, text, names in zip(*(column.to_pylist() for column in read.columns), strict=True):
            title = html.unescape(text or "").strip()
            if not raw or not title:
                untitled += 1
            elif raw in seen:
                repeated += 1
            else:
                seen.add(raw)
                table.raw.append(raw)
                table.titles.append(title)
                table.years.append(None)
                table.categories.append([html.unescape(name) for name in names or [] if name])
    untitled += sum(bad.counts.values())
    if untitled or repeated:
        notes.append(f"{path.name}: {untitled} products without a title and {repeated} repeated ones are left out")
    return table


def _line_chunks(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as handle:
            while chunk := handle.read(_META_CHUNK):
                yield chunk + handle.readline()
    except GZIP_FAULTS as fault:
        raise UserError(f"{path} cannot be decompressed ({fault}); download the file again.") from None


def read_json(data: pa.Buffer, path: Path, schema: pa.Schema, bad: BadRows) -> Table:
    """Reads the columns of `schema` from lines of JSON objects. Missing fields are null; an invalid line is a bad row."""
    num_lines = _count_lines(data)
    if data.size:
        try:
            table = pyarrow.json.read_json(
                pa.BufferReader(data),
                read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=max(min(data.size, 2**31 - 1), 1)),
                parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
            table.validate(full=True)  # the parser accepts bytes that are not UTF-8
            if table.num_rows == num_lines:
                return Table(path, schema.names, table.columns, np.arange(1, num_lines + 1, dtype=np.int64), num_lines)
        except pa.ArrowInvalid:
            pass  # a line is invalid or blank: the slow way finds it
    return _line_by_line(data, path, schema, bad, num_lines)


def _count_lines(data: pa.Buffer) -> int:
    text: bytes = data.to_pybytes()
    return text.count(b"\n") + int(bool(text) and not text.endswith(b"\n"))


def _line_by_line(data: pa.Buffer, path: Path, schema: pa.Schema, bad: BadRows, num_lines: int) -> Table:
    values: list[list[Any]] = [[] for _ in schema.names]
    lines: list[int] = []
    for number, line in enumerate(io.BytesIO(data.to_pybytes()), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            row = [pa.scalar(_as(fields.get(name), kind), kind) for name, kind in zip(schema.names, schema.types, strict=True)]
        except (ValueError, AttributeError, TypeError, OverflowError, RecursionError, pa.ArrowInvalid):
            bad.add("not a JSON object of a review", path, np.array([number]), line.decode("utf-8", errors="replace").strip())
            continue
        lines.append(number)
        for column, value in zip(values, row, strict=True):
            column.append(value.as_py())
    columns = [pa.chunked_array([pa.array(column, kind)]) for column, kind in zip(values, schema.types, strict=True)]
    return Table(path, schema.names, columns, np.array(lines, dtype=np.int64), num_lines)


def _as(value: Any, kind: pa.DataType) -> Any:
    """Converts a whole number to a float, as the fast parser does; Arrow's own conversion rejects numbers above 2**53."""
    if type(value) is int and pa.types.is_floating(kind):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value
