"""Parquet: one file or a folder of parts, with columns as in csv. A block is a run of row groups."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rec_dist.data.sources.assemble import RowBlock, assemble
from rec_dist.data.sources.blocks import Block, in_store, is_stored_only, whole
from rec_dist.data.sources.header import refuse_twins
from rec_dist.data.sources.interactions import BadRows, KnownItems
from rec_dist.data.sources.roles import Roles, pick_roles
from rec_dist.data.sources.source import Source
from rec_dist.data.sources.table import Table, as_text, is_list
from rec_dist.data.sources.times import holds_dates
from rec_dist.errors import UserError, one_line

_BATCH_ROWS = 1024
_BYTES_A_ROW = 30  # as for delimited text, so that both kinds of block hold about as many rows


@dataclass(frozen=True)
class ParquetRows:
    """Implements RowReader for Parquet files. dates: a text in the column of timestamps is a date."""

    roles: Roles
    dates: bool = False

    def read(self, block: Block, known: KnownItems | None) -> RowBlock:
        """Reads the rows of some row groups. The line of a row is its number in them."""
        role_of = {name: role for role, name in vars(self.roles).items() if name is not None}

        def row_groups(file: pq.ParquetFile) -> pa.Table:
            end = file.num_row_groups if block.end is None else block.end
            return _read(block.path, lambda: file.read_row_groups(range(block.begin, end), columns=list(role_of)))

        if is_stored_only(block):
            read = in_store(block, lambda stored: _from_store(stored, lambda file: row_groups(_open(file, block.path))))
        else:
            with _open(block.data) as file:
                read = row_groups(file)
        columns = [_plain(block.path, name, read.column(name), role_of[name]) for name in read.column_names]
        lines = np.arange(1, read.num_rows + 1, dtype=np.int64)
        table = Table(block.path, read.column_names, columns, lines, read.num_rows)
        return assemble(table, self.roles, BadRows(block.file), known, None, dates=self.dates)

    def cut(self, block: Block, size: int) -> list[Block]:
        """Cuts a file into blocks of whole row groups with about as many rows as `size` bytes of text."""
        with _open(block.data) as file:
            rows = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        blocks, begin, held = [], 0, 0
        for index, count in enumerate(rows):
            held += count
            if held >= size // _BYTES_A_ROW or index + 1 == len(rows):
                blocks.append(replace(block, begin=begin, end=index + 1))
                begin, held = index + 1, 0
        return blocks

    def num_rows(self, block: Block) -> int:
        """The number of rows that the file states."""
        with _open(block.data) as file:
            return int(file.metadata.num_rows)


def open_parquet(paths: list[Path], columns: Mapping[str, str]) -> Source:
    """Opens files with the same columns in the order of their names, with one interaction per row. Roles are as in open_csv."""
    notes: list[str] = []
    with _open(paths[0]) as first:
        schema = first.schema_arrow
    refuse_twins(paths[0], schema.names)
    roles = pick_roles(paths[0], schema.names, columns, notes)
    for role, name in vars(roles).items():
        if name is not None and not can_be(role, schema.field(name).type):
            raise UserError(
                f"{paths[0]}: the column {name} is of type {schema.field(name).type}, which cannot be a {role}; write it as a "
                "number or as text, or name another column in data.columns."
            )
    for path in paths[1:]:
        with _open(path) as file:
            other = file.schema_arrow
        for name in vars(roles).values():
            if name is not None and (name not in other.names or other.field(name).type != schema.field(name).type):
                raise UserError(
                    f"{path}: the column {name} is missing or of another type than in {paths[0].name}; write all files with "
                    "the same columns."
                )
    dates = roles.timestamp is not None and _begins_with_dates(paths[0], roles.timestamp)
    return Source([whole(number, path) for number, path in enumerate(paths)], ParquetRows(roles, dates), notes=notes)


def read_records(path: Path, wanted: Callable[[list[str]], list[str] | None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, fields) of a file that is read row by row. wanted: the names of its columns -> those to read, or None for all.

    Raises UserError if the file is unreadable, or two columns have one name.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            refuse_twins(path, names)
            batches = file.iter_batches(_BATCH_ROWS, columns=wanted(names))
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as fault:
        raise UserError(f"{path} cannot be read as Parquet ({one_line(fault)}); write the file again.") from None


def can_be(role: str, kind: pa.DataType) -> bool:
    """Whether a column of this type fits a role: text and numbers fit all, dates all but rating, lists only categories."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_list(kind):
        return role == "categories" and not pa.types.is_nested(kind.value_type)
    if pa.types.is_temporal(kind):
        return role != "rating" and not pa.types.is_interval(kind)
    if role in ("rating", "timestamp"):
        return _is_number(kind) or _is_text(kind)
    return _is_number(kind) or _is_text(kind) or pa.types.is_boolean(kind) or _is_bytes(kind) or isinstance(kind, pa.UuidType)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or _is_bytes(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _plain(path: Path, name: str, column: pa.ChunkedArray, role: str) -> pa.ChunkedArray:
    """A column whose text is plain strings, so that bytes in it that are not UTF-8 are found here."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_list(column.type) or (role in ("rating", "timestamp") and not _is_text(column.type)):
        return column
    text = _read(path, lambda: as_text(column), f"the column {name}")
    return pc.utf8_trim_whitespace(text) if role in ("rating", "timestamp") else text


def _begins_with_dates(path: Path, column: str) -> bool:
    with _open(path) as file:
        head = _read(path, lambda: next(file.iter_batches(_BATCH_ROWS, columns=[column]), None))
    return head is not None and holds_dates(_plain(path, column, pa.chunked_array([head.column(0)]), "timestamp"))


def _read(path: Path, read: Callable[[], Any], what: str = "its columns") -> Any:
    try:
        found = read()
        if isinstance(found, pa.Table):
            found.validate(full=True)  # a column of text may hold bytes that are not UTF-8
        return found
    except (OSError, pa.ArrowException) as fault:
        shown = one_line(fault)
        raise UserError(f"{path} cannot be read ({what}: {shown}); write the file again, with text in UTF-8.") from None


class _Watched:
    """An open file of a store that remembers a fault of the store, which Parquet's reader reports like damage of the file."""

    def __init__(self, stored: Any) -> None:
        self.closed = False
        self.fault: OSError | None = None
        self.seek, self.tell, self.close = stored.seek, stored.tell, stored.close
        self._read = stored.read

    def read(self, size: int | None = None) -> Any:
        try:
            return self._read(size)
        except OSError as fault:
            self.fault = fault
            raise


def _from_store(stored: Any, read: Callable[[Any], pa.Table]) -> pa.Table:
    """What `read` returns for an open file. Raises UserError if the file is damaged, and OSError if its store fails."""
    watched = _Watched(stored)
    try:
        return read(pa.PythonFile(watched, mode="r"))
    except UserError:
        if watched.fault is not None:
            raise watched.fault from None
        raise


def _open(file: Any, path: Path | None = None) -> pq.ParquetFile:
    """Opens a path, or an open file that messages call `path`."""
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as fault:
        raise UserError(f"{path or file} is not a Parquet file ({one_line(fault)}); write the file again.") from None
