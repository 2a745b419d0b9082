"""The columns of one block of a file. Each row keeps its physical line, so that messages can name file:line.

Delimited text becomes string columns; Parquet and JSON have their own types. pyarrow reads millions of rows in seconds, without
a Python object per cell. It uses one thread, because only then are the line numbers of malformed rows known.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rec_dist.data.sources.blocks import Block, read_buffer
from rec_dist.data.sources.interactions import BadRows, Bool
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I64

_INTEGER = r"^[+-]?\d{1,19}$"
_OTHER_THAN_DIGITS = r"[^0-9-]"
_LARGEST_INT64, _LARGEST_NEGATIVE = "9223372036854775807", "9223372036854775808"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_LARGEST_TIMESTAMP = 2.0**62
CATEGORY_SEPARATOR = "|"


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
        """One column as strings. Missing values are empty; lists of strings are joined by "|"."""
        column = self.column(name)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = pc.binary_join(pc.cast(column, pa.list_(pa.string())), CATEGORY_SEPARATOR)
        if column.type == pa.string() and column.null_count == 0:
            return column
        return pc.fill_null(pc.cast(column, pa.string()), "")

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

    def floats(self, name: str) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], Bool]:
        """One column as (R,) float64, and which values are finite numbers."""
        column = self.column(name)
        if not _is_text(column):
            values = pc.fill_null(pc.cast(column, pa.float64()), float("nan")).to_numpy()
            return values, np.isfinite(values)
        try:
            values = pc.cast(column, pa.float64()).to_numpy()
        except pa.ArrowInvalid:
            number = pc.match_substring_regex(column, _NUMBER)
            values = pc.cast(pc.if_else(number, column, "nan"), pa.float64()).to_numpy()
        return values, np.isfinite(values)

    def timestamps(self, name: str) -> tuple[I64, Bool]:
        """One column as (R,) int64, and which values are numbers. Floats are rounded down; integers keep all digits.

        A column of dates or times is in its own unit (days, milliseconds, ...).
        """
        column = self.column(name)
        if not _is_text(column):
            return self._typed_timestamps(column)
        # A cell must mean the same whatever the other rows hold. Arrow's cast accepts 0x1F and +5, but the slow way does not.
        if not pc.any(pc.match_substring_regex(column, _OTHER_THAN_DIGITS)).as_py():
            try:
                return pc.cast(column, pa.int64()).to_numpy(), np.ones(len(self.lines), dtype=bool)
            except pa.ArrowInvalid:
                pass
        values, readable = self.floats(name)
        integer = _fits_int64(column)
        readable &= (np.abs(np.where(readable, values, 0)) < _LARGEST_TIMESTAMP) | integer
        exact = pc.cast(pc.if_else(pa.array(integer), pc.utf8_ltrim(column, characters="+"), "0"), pa.int64()).to_numpy()
        rounded = np.floor(np.where(readable & ~integer, values, 0)).astype(np.int64)
        return np.where(integer, exact, rounded), readable

    def _typed_timestamps(self, column: pa.ChunkedArray) -> tuple[I64, Bool]:
        readable = pc.is_valid(column).to_numpy()
        if pa.types.is_decimal(column.type):
            column = pc.cast(column, pa.float64())
        if pa.types.is_floating(column.type):
            values = pc.fill_null(pc.cast(column, pa.float64()), float("nan")).to_numpy()
            readable = np.isfinite(values) & (np.abs(np.where(np.isfinite(values), values, 0)) < _LARGEST_TIMESTAMP)
            return np.floor(np.where(readable, values, 0)).astype(np.int64), readable
        if pa.types.is_date32(column.type) or pa.types.is_time32(column.type):
            column = pc.cast(column, pa.int32())
        if pa.types.is_uint64(column.type):
            readable &= pc.fill_null(pc.less_equal(column, pa.scalar(2**63 - 1, pa.uint64())), False).to_numpy()
            column = pc.if_else(pa.array(readable), column, pa.scalar(0, pa.uint64()))
        return pc.fill_null(pc.cast(column, pa.int64()), 0).to_numpy(), readable


def _fits_int64(column: pa.ChunkedArray) -> Bool:
    """(R,): which cells are whole numbers that fit into 64 bits exactly. Nanoseconds since 1970 have 19 digits."""
    digits = pc.utf8_ltrim(column, characters="+-")
    largest = pc.if_else(pc.starts_with(column, "-"), _LARGEST_NEGATIVE, _LARGEST_INT64)
    short = pc.less(pc.binary_length(digits), len(_LARGEST_INT64))
    fits: Bool = pc.and_(pc.match_substring_regex(column, _INTEGER), pc.or_(short, pc.less_equal(digits, largest))).to_numpy()
    return fits


def _is_text(column: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def parse_table(
    block: Block,
    bad: BadRows,
    *,
    names: Sequence[str],
    delimiter: str,
    quoted: bool = False,
    escaped: bool = False,
    encoding: str = "utf8",
    lines_before: int = 0,
) -> Table:
    """Reads a block of delimited text. Adds rows with another number of columns than `names` to `bad`.

    delimiter can be "::". escaped: a backslash in a cell makes the next character literal. The first row counts as line
    lines_before + 1. Raises UserError for bytes that are not in the encoding, or text that cannot be cut into rows at all.
    """
    data, path = read_buffer(block.data, block.begin, block.end), block.path
    if len(delimiter) > 1:
        # MovieLens 1M separates by "::", but the parser takes one byte only. No title there holds the unit separator 0x1F.
        data, delimiter = pa.py_buffer(data.to_pybytes().replace(delimiter.encode(), b"\x1f")), "\x1f"
    malformed: list[int] = []

    def keep_going(row: pyarrow.csv.InvalidRow) -> str:
        malformed.append(row.number)
        reason = f"{row.actual_columns} columns instead of {row.expected_columns}"
        bad.add(reason, path, np.array([lines_before + row.number]), row.text)
        return "skip"

    try:
        columns = _parse(data, list(names), delimiter, quoted, escaped, encoding, keep_going)
    except (pa.ArrowInvalid, UnicodeDecodeError) as fault:
        raise UserError(_unreadable(block, encoding, str(fault))) from None
    num_lines = len(columns[0]) + len(malformed)
    lines = lines_before + np.setdiff1d(np.arange(1, num_lines + 1, dtype=np.int64), np.array(malformed, dtype=np.int64))
    table = Table(path, list(names), columns, lines, num_lines)
    filled = _filled(columns)
    return table if filled.all() else table.where(pa.array(filled))


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
        read_options=pyarrow.csv.ReadOptions(use_threads=False, column_names=names, encoding=encoding),
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
    return [pc.utf8_trim_whitespace(column) for column in table.columns]


def _unreadable(block: Block, encoding: str, fault: str) -> str:
    before = read_buffer(block.data, 0, block.begin).to_pybytes().count(b"\n")
    rows = read_buffer(block.data, block.begin, block.end).to_pybytes()
    for number, line in enumerate(io.BytesIO(rows), start=before + 1):
        try:
            line.decode(encoding)
        except UnicodeDecodeError:
            return f"{block.path}:{number}: this line is not {encoding.upper()} text; save the file in that encoding."
    return f"{block.path} cannot be read as delimited text ({' '.join(fault.split())}); look for a quote that is never closed."
