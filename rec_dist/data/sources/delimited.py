"""Rows of delimited text, for csv, RecBole's atomic files and MovieLens' ratings."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rec_dist.data.sources.assemble import Roles, RowBlock, assemble
from rec_dist.data.sources.blocks import Block, cut_text
from rec_dist.data.sources.interactions import BadRows
from rec_dist.data.sources.table import parse_table

_BYTES_A_ROW = 30  # user, item, rating and time, without a title


@dataclass(frozen=True)
class DelimitedRows:
    """Implements RowReader. items_path: the items file that must hold the item of every row."""

    names: list[str]
    delimiter: str
    quoted: bool
    roles: Roles
    items_path: Path | None = None

    def read(self, block: Block, known: pa.Array | None) -> RowBlock:
        """Reads the rows of a block of text."""
        bad = BadRows(block.file)
        table = parse_table(block, bad, names=self.names, delimiter=self.delimiter, quoted=self.quoted)
        return assemble(table, self.roles, bad, known, self.items_path)

    def cut(self, block: Block, size: int) -> list[Block]:
        """Cuts a file into blocks of whole rows."""
        return cut_text(block, quoted_after=self.delimiter if self.quoted else None, size=size)

    def num_rows(self, block: Block) -> int:
        """An estimate from the size of the file."""
        return block.data.stat().st_size // _BYTES_A_ROW + 1
