"""Delimited text into string columns, with the physical line of each row kept so that a fault can be named as file:line.

Why pyarrow and not a loop: millions of rows take seconds and no Python object a cell. Cost: one thread, because only
then are the line numbers of malformed rows known.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rec_dist.data.interactions import BadRows, Bool
from rec_dist.runtime.errors import UserError
from rec_dist.stream.trunk import I64

_INTEGER = r"^-?\d{1,18}$"
_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_LARGEST_TIMESTAMP = 2.0**62


@dataclass(frozen=True)
class Table:
    """The readable rows of one file: names (C,), columns (C,) of strings with surrounding blanks cut, lines (R,) 1-based."""

    path: Path
    names: list[str]
    columns: list[pa.ChunkedArray]
    lines: I64

    def texts(self, name: str) -> list[str]:
        """One column as Python strings; for small tables such as items."""
        return [str(text) for text in self.columns[self.names.index(name)].to_pylist()]

    def codes(self, name: str) -> tuple[I64, list[str]]:
        """One column as (R,) indices into its distinct values, which stand in order of first appearance."""
        encoded = self.columns[self.names.index(name)].dictionary_encode().combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):  # a column without rows has no chunk to combine
            return np.zeros(0, dtype=np.int64), []
        return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), [str(v) for v in encoded.dictionary.to_pylist()]

    def cell(self, name: str, row: int) -> str:
        """The text of one cell."""
        return str(self.columns[self.names.index(name)][row].as_py())

    def floats(self, name: str) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], Bool]:
        """One column as (R,) float64 and which of them are finite numbers."""
        column = self.columns[self.names.index(name)]
        try:
            values = pc.cast(column, pa.float64()).to_numpy()
        except pa.ArrowInvalid:
            number = pc.match_substring_regex(column, _NUMBER)
            values = pc.cast(pc.if_else(number, column, "nan"), pa.float64()).to_numpy()
        return values, np.isfinite(values)

    def timestamps(self, name: str) -> tuple[I64, Bool]:
        """One column as (R,) int64 and which of them are numbers; floats are rounded down, integers keep all their digits."""
        column = self.columns[self.names.index(name)]
        try:
            return pc.cast(column, pa.int64()).to_numpy(), np.ones(len(self.lines), dtype=bool)
        except pa.ArrowInvalid:
            pass
        values, readable = self.floats(name)
        readable &= np.abs(np.where(readable, values, 0)) < _LARGEST_TIMESTAMP
        integer = pc.match_substring_regex(column, _INTEGER)
        exact = pc.cast(pc.if_else(integer, column, "0"), pa.int64()).to_numpy()
        rounded = np.floor(np.where(readable, values, 0)).astype(np.int64)
        return np.where(integer.to_numpy(), exact, rounded), readable


def read_table(
    path: Path,
    bad: BadRows,
    *,
    delimiter: str,
    names: Sequence[str] | None = None,
    quoted: bool = False,
    encoding: str = "utf8",
) -> Table:
    """Reads a delimited file; names=None takes them from the first line. Rows with another number of columns go to `bad`.

    delimiter may be "::". A type after a colon in the header (RecBole's `user_id:token`) is cut off. UserError: no such file, no
    header, bytes that are not in the encoding, or text that cannot be cut into rows at all.
    """
    if not path.is_file():
        raise UserError(f"data.source: the file {path} does not exist; give a folder that holds it.")
    raw = pa.memory_map(str(path)) if path.stat().st_size else pa.BufferReader(b"")
    data = raw.read_buffer()
    skip = 0
    if names is None:
        names, skip = _header(path, data, delimiter, quoted), 1
    if len(delimiter) > 1:
        # MovieLens 1M separates by "::", which a parser of one-byte separators cannot; no title there holds a unit separator.
        data, delimiter = pa.py_buffer(data.to_pybytes().replace(delimiter.encode(), b"\x1f")), "\x1f"
    malformed: list[int] = []

    def keep_going(row: pyarrow.csv.InvalidRow) -> str:
        malformed.append(row.number)
        reason = f"{row.actual_columns} columns instead of {row.expected_columns}"
        bad.add(reason, path, np.array([row.number]), row.text)
        return "skip"

    columns = _parse(path, data, delimiter, list(names), skip, quoted, encoding, keep_going)
    lines = np.arange(skip + 1, skip + 1 + len(columns[0]) + len(malformed), dtype=np.int64)
    lines = np.setdiff1d(lines, np.array(malformed, dtype=np.int64))
    filled = _filled(columns)
    if not filled.all():
        columns, lines = [column.filter(pa.array(filled)) for column in columns], lines[filled]
    return Table(path, list(names), columns, lines)


def _filled(columns: list[pa.ChunkedArray]) -> Bool:
    """Which rows (R,) hold any text: a blank line says nothing and is no fault."""
    blank: Bool = np.ones(len(columns[0]), dtype=bool)
    for column in columns:
        if not blank.any():
            break
        blank &= pc.equal(column, "").to_numpy()
    return ~blank


def _header(path: Path, data: pa.Buffer, delimiter: str, quoted: bool) -> list[str]:
    first = io.BytesIO(data.slice(0, min(data.size, 1 << 16)).to_pybytes()).readline()
    text = first.decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if not text:
        raise UserError(f"{path}:1: the first line is empty; it must name the columns.")
    cells = next(csv.reader([text], delimiter=delimiter)) if quoted else text.split(delimiter)
    names = [cell.strip() if quoted else cell.strip().partition(":")[0] for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}:1: the column {name!r} stands there twice; rename one.")
    return names


def _parse(
    path: Path,
    data: pa.Buffer,
    delimiter: str,
    names: list[str],
    skip: int,
    quoted: bool,
    encoding: str,
    on_bad: object,
) -> list[pa.ChunkedArray]:
    if data.size == 0:
        return [pa.chunked_array([], pa.string()) for _ in names]
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, column_names=names, skip_rows=skip, encoding=encoding),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                ignore_empty_lines=False,  # skipping them silently would shift the line numbers
                invalid_row_handler=on_bad,
            ),
            convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names}),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as fault:
        raise UserError(_unreadable(path, encoding, str(fault))) from None
    return [pc.utf8_trim_whitespace(column) for column in table.columns]


def _unreadable(path: Path, encoding: str, fault: str) -> str:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return f"{path}:{number}: this line is not {encoding.upper()} text; save the file in that encoding."
    return f"{path} cannot be read as delimited text ({' '.join(fault.split())}); look for a quote that is never closed."
