"""Parquet: one file or a folder of parts, with columns as in csv. A block is a run of row groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rec_dist.data.sources.assemble import Roles, RowBlock, assemble
from rec_dist.data.sources.blocks import Block, whole
from rec_dist.data.sources.columns import pick_roles
from rec_dist.data.sources.header import refuse_twins
from rec_dist.data.sources.interactions import BadRows
from rec_dist.data.sources.source import Source
from rec_dist.data.sources.table import Table
from rec_dist.errors import UserError

_BYTES_A_ROW = 30  # as for delimited text, so that both kinds of block hold about as many rows


@dataclass(frozen=True)
class ParquetRows:
    """Implements RowReader for Parquet files."""

    roles: Roles

    def read(self, block: Block, known: pa.Array | None) -> RowBlock:
        """Reads the rows of some row groups. The line of a row is its number in them."""
        wanted = [name for name in vars(self.roles).values() if name is not None]
        with _open(block.data) as file:
            end = file.num_row_groups if block.end is None else block.end
            try:
                read = file.read_row_groups(range(block.begin, end), columns=wanted)
                read.validate(full=True)  # a column of text may hold bytes that are not UTF-8
                columns = [_plain(column) for column in read.columns]
            except (OSError, pa.ArrowInvalid) as fault:
                raise UserError(f"{block.path} cannot be read ({' '.join(str(fault).split())}); write the file again.") from None
        lines = np.arange(1, read.num_rows + 1, dtype=np.int64)
        table = Table(block.path, read.column_names, columns, lines, read.num_rows)
        return assemble(table, self.roles, BadRows(block.file), known, None)

    def cut(self, block: Block, size: int) -> list[Block]:
        """Cuts a file into blocks of whole row groups with about as many rows as `size` bytes of text."""
        with _open(block.data) as file:
            rows = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        blocks, begin, held = [], 0, 0
        for index, count in enumerate(rows):
            held += count
            if held >= size // _BYTES_A_ROW or index + 1 == len(rows):
                blocks.append(Block(block.file, block.path, block.data, begin, index + 1))
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
    return Source([whole(number, path) for number, path in enumerate(paths)], ParquetRows(roles), notes=notes)


def can_be(role: str, kind: pa.DataType) -> bool:
    """Whether a column of this type fits a role. Text and numbers fit all, dates all but rating, lists only text roles."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return role not in ("rating", "timestamp") and not pa.types.is_nested(kind.value_type)
    return not pa.types.is_nested(kind) and not (role == "rating" and pa.types.is_temporal(kind))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Converts categories to their values and bytes to text. Raises ArrowInvalid for bytes that are not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    bytes_like = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    if bytes_like or pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        column = column.cast(pa.string())
    return column


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as fault:
        raise UserError(f"{path} is not a Parquet file ({' '.join(str(fault).split())}); write the file again.") from None
