"""Parquet: one file or a folder of parts, columns named as in csv. Blocks are runs of row groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rec_dist.data.interactions import BadRows
from rec_dist.data.readers.assemble import Roles, RowBlock, assemble
from rec_dist.data.readers.blocks import Block, whole
from rec_dist.data.readers.columns import pick_roles
from rec_dist.data.readers.source import Source
from rec_dist.data.readers.table import Table
from rec_dist.runtime.errors import UserError

_BYTES_A_ROW = 30  # what a block of text takes a row, so that both kinds of block hold about as many rows


@dataclass(frozen=True)
class ParquetRows:
    """Implements RowReader."""

    roles: Roles

    def read(self, block: Block, known: pa.Array | None) -> RowBlock:
        """The rows of some row groups; the line of a row is its number in them."""
        wanted = [name for name in vars(self.roles).values() if name is not None]
        with _open(block.data) as file:
            end = file.num_row_groups if block.end is None else block.end
            try:
                read = file.read_row_groups(range(block.begin, end), columns=wanted)
            except (OSError, pa.ArrowInvalid) as fault:
                raise UserError(f"{block.path} cannot be read ({' '.join(str(fault).split())}); write the file again.") from None
        lines = np.arange(1, read.num_rows + 1, dtype=np.int64)
        table = Table(block.path, read.column_names, read.columns, lines, read.num_rows)
        return assemble(table, self.roles, BadRows(block.file), known, None)

    def cut(self, block: Block, size: int) -> list[Block]:
        """Blocks of whole row groups with as many rows as a block of `size` bytes of text, or one row group with more."""
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
        """As the file says."""
        with _open(block.data) as file:
            return int(file.metadata.num_rows)


def open_parquet(paths: list[Path], columns: Mapping[str, str]) -> Source:
    """Files of the same columns, in the order of their names, one interaction a row. Roles are as in open_csv."""
    notes: list[str] = []
    with _open(paths[0]) as first:
        schema = first.schema_arrow
    roles = pick_roles(paths[0], schema.names, columns, notes)
    for path in paths[1:]:
        with _open(path) as file:
            other = file.schema_arrow
        for name in vars(roles).values():
            if name is not None and (name not in other.names or other.field(name).type != schema.field(name).type):
                raise UserError(
                    f"{path}: the column {name} is missing or of another type than in {paths[0].name}; write them alike."
                )
    return Source([whole(number, path) for number, path in enumerate(paths)], ParquetRows(roles), notes=notes)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as fault:
        raise UserError(f"{path} is no Parquet file ({' '.join(str(fault).split())}); write the file again.") from None
