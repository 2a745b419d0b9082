"""The columns of one block of a file. Each row keeps the line of the file in which it begins, so that messages can name file:line.

Delimited text becomes string columns; Parquet and JSON have their own types. pyarrow reads millions of rows in seconds, without
a Python object per cell. It uses one thread, because only then are the line numbers of malformed rows known.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rec_dist.data.sources.blocks import Block, read_block
from rec_dist.data.sources.interactions import BadRows, Bool
from rec_dist.data.sources.quotes import Quoting
from rec_dist.errors import UserError, one_line
from rec_dist.runtime.arrays import I64

CATEGORY_SEPARATOR = "|"
_LONGEST_ROW = 1 << 25  # bytes; pyarrow's own limit is 1 MiB, and quotes.py takes cells of up to 16 MiB


@dataclass(frozen=True)
class Table:
    """The readable rows of one block: names (C,), columns (C,) of Arrow values, lines (R,) from 1, and num_lines of the block."""

    path: Path
    names: list[str]
    columns: list[pa.ChunkedArray]
    lines: I64
    num_lines: int

    def where(self, kept: pa.Array | pa.ChunkedArray) -> "Table":
        """Keeps the rows where kept (R,) is true. Line numbers and num_lines stay those of the block."""
        lines = self.lines[np.asarray(kept)]
        return Table(self.path, self.names, [column.filter(kept) for column in self.columns], lines, self.num_lines)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as it was read."""
        return self.columns[self.names.index(name)]

    def strings(self, name: str) -> pa.ChunkedArray:
        """One column as strings, as as_text makes them. Missing values are empty."""
        column = self.column(name)
        if column.type == pa.string() and column.null_count == 0:
            return column
        return pc.fill_null(as_text(column), "")

    def texts(self, name: str) -> list[str]:
        """One column as Python strings, for small tables such as items."""
        return [str(text) for text in self.strings(name).to_pylist()]

    def codes(self, name: str) -> tuple[I64, pa.Array]:
        """One column as (R,) indices into its distinct values, which are in order of first appearance."""
        encoded = self.strings(name).dictionary_encode().combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):  # a column without rows has no chunk to combine
            return np.zeros(0, dtype=np.int64), pa.array([], pa.string())
        return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary

    def cell(self, name: str, row: int) -> str:
        """The text of one cell."""
        value = self.column(name)[row].as_py()
        return "" if value is None else str(value)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is a list of values."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as strings, each value as its source would write it; nulls stay. Raises ArrowInvalid for bytes that are not UTF-8.

    Whole floats have neither a point nor an exponent, since they are the ids of a column with gaps; NaN is null.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_text(column.cast(kind.value_type))
    if isinstance(kind, pa.BaseExtensionType):  # a UUID; can_be admits no other
        return pa.chunked_array([pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())])
    if pa.types.is_floating(kind):
        return _floats_as_text(column)
    return pc.cast(column, pa.string())


def _floats_as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = pc.cast(column, pa.float64())
    values = pc.if_else(pc.is_nan(values), None, values)
    size = pc.abs(values)
    whole = pc.and_(pc.equal(values, pc.floor(values)), pc.less(size, 2.0**63))
    numbers = pc.cast(pc.cast(pc.if_else(whole, values, 0.0), pa.int64()), pa.string())
    written = pc.cast(pc.if_else(pc.is_null(values), pa.scalar(None, column.type), column), pa.string())
    return pc.if_else(pc.fill_null(whole, False), numbers, written)


def parse_table(
    block: Block,
    bad: BadRows,
    *,
    names: Sequence[str],
    delimiter: str,
    quoting: Quoting = "none",
    escaped: bool = False,
    encoding: str = "utf8",
    lines_before: int = 0,
) -> Table:
    """Reads a block of delimited text. Adds rows with another number of columns than `names` to `bad`.

    delimiter can be "::". quoting: what quotes mean (quotes.py). escaped: a backslash in a cell makes the next character literal. The
    first row begins in line lines_before + 1. Raises UserError for bytes that are not in the encoding, or text that cannot be cut
    into rows at all.
    """
    data, path = read_block(block), block.path
    if len(delimiter) > 1:
        # MovieLens 1M separates by "::", but the parser takes one byte only. No title there holds the unit separator 0x1F.
        data, delimiter = pa.py_buffer(data.to_pybytes().replace(delimiter.encode(), b"\x1f")), "\x1f"
    malformed: list[tuple[int, int, int]] = []  # (number, cells, line ends in it) of each row
    first: dict[int, str] = {}  # the first row with so many cells

    def keep_going(row: pyarrow.csv.InvalidRow) -> str:
        malformed.append((row.number, row.actual_columns, row.text.count("\n")))
        first.setdefault(row.actual_columns, row.text)
        return "skip"

    try:
        if quoting == "lines" and b'"' in data.to_pybytes():
            return _by_lines(block, data, bad, list(names), delimiter, encoding, lines_before)
        columns = _parse(data, list(names), delimiter, quoting != "none", escaped, encoding, keep_going)
    except (pa.ArrowInvalid, UnicodeDecodeError) as fault:
        raise UserError(_unreadable(block, encoding, fault)) from None
    numbers, cells, inside = np.array(malformed, dtype=np.int64).reshape(-1, 3).T
    is_whole: Bool = np.ones(len(columns[0]) + len(malformed), dtype=bool)
    is_whole[numbers - 1] = False
    lines, num_lines = _lines_of(columns, is_whole, inside)
    for count, text in first.items():
        bad.add(columns_fault(count, len(names)), path, lines_before + lines[~is_whole][cells == count], text)
    columns = [pc.utf8_trim_whitespace(column) for column in columns]
    table = Table(path, list(names), columns, lines_before + lines[is_whole], num_lines)
    filled = _filled(columns)
    return table if filled.all() else table.where(pa.array(filled))


def _lines_of(columns: list[pa.ChunkedArray], is_whole: Bool, others: I64) -> tuple[I64, int]:
    """(the line, from 1, in which each row (R,) of a block begins, the lines of the block): quoted cells may hold line ends.

    is_whole (R,): which rows are those of `columns`; others: how many line ends each of the rest holds.
    """
    inside: I64 = np.zeros(len(is_whole), dtype=np.int64)
    inside[is_whole] = sum(pc.count_substring(column, "\n").to_numpy() for column in columns)
    inside[~is_whole] = others
    before = np.cumsum(inside) - inside
    return before + np.arange(1, len(inside) + 1), len(inside) + int(inside.sum())


def _by_lines(
    block: Block, data: pa.Buffer, bad: BadRows, names: list[str], delimiter: str, encoding: str, lines_before: int
) -> Table:
    """The slow way, 2 us a line, for a file with faulty quotes: every line is a row, and one with such a quote is bad."""
    rows: list[list[str]] = []
    lines: list[int] = []
    number = 0
    for number, line in enumerate(io.BytesIO(data.to_pybytes()), start=1):
        text = line.decode("utf-8" if encoding == "utf8" else encoding).rstrip("\r\n")
        if not text.strip():
            continue
        try:
            cells = next(csv.reader([text], delimiter=delimiter, strict=True))
        except csv.Error:
            bad.add("a quoted cell does not end with its quote", block.path, np.array([lines_before + number]), text)
            continue
        if len(cells) != len(names):
            bad.add(columns_fault(len(cells), len(names)), block.path, np.array([lines_before + number]), text)
            continue
        rows.append(cells)
        lines.append(lines_before + number)
    columns = zip(*rows, strict=True) if rows else [[] for _ in names]
    texts = [pc.utf8_trim_whitespace(pa.chunked_array([pa.array(list(cells), pa.string())])) for cells in columns]
    return Table(block.path, names, texts, np.array(lines, dtype=np.int64), number)


def columns_fault(found: int, wanted: int) -> str:
    """The reason for which a row with `found` cells under `wanted` columns is bad."""
    return f"{found} column{'' if found == 1 else 's'} instead of {wanted}"


def _filled(columns: list[pa.ChunkedArray]) -> Bool:
    """(R,): which rows hold any text. A blank line is not a fault."""
    blank: Bool = np.ones(len(columns[0]), dtype=bool)
    for column in columns:
        if not blank.any():
            break
        blank &= pc.equal(column, "").to_numpy()
    return ~blank


def _parse(
    data: pa.Buffer, names: list[str], delimiter: str, quoted: bool, escaped: bool, encoding: str, on_bad: Any
) -> list[pa.ChunkedArray]:
    if data.size == 0:
        return [pa.chunked_array([], pa.string()) for _ in names]
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False, column_names=names, encoding=encoding, block_size=min(data.size, _LONGEST_ROW)
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if quoted else False,
            escape_char="\\" if escaped else False,
            newlines_in_values=quoted,
            ignore_empty_lines=False,  # skipping them would shift the line numbers
            invalid_row_handler=on_bad,
        ),
        convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names}),
    )
    columns: list[pa.ChunkedArray] = table.columns
    return columns


def _unreadable(block: Block, encoding: str, fault: Exception) -> str:
    before = read_block(replace(block, begin=0, end=block.begin)).to_pybytes().count(b"\n")
    rows = read_block(block).to_pybytes()
    for number, line in enumerate(io.BytesIO(rows), start=before + 1):
        try:
            line.decode(encoding)
        except UnicodeDecodeError:
            return f"{block.path}:{number}: this line is not {encoding.upper()} text; save the file in that encoding."
    return f"{block.path} cannot be read as delimited text ({one_line(fault)}); look for a quote that is never closed."
