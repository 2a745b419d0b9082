"""Rows of delimited text, for csv, RecBole's atomic files and MovieLens' ratings."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rec_dist.data.sources.assemble import RowBlock, assemble
from rec_dist.data.sources.blocks import Block, cut_text, first_bytes
from rec_dist.data.sources.interactions import BadRows, KnownItems
from rec_dist.data.sources.quotes import Quoting
from rec_dist.data.sources.roles import Roles
from rec_dist.data.sources.table import parse_table
from rec_dist.data.sources.times import holds_dates

_BYTES_A_ROW = 30  # user, item, rating and time, without a title


@dataclass(frozen=True)
class DelimitedRows:
    """Implements RowReader. items_path: the items file that must hold the item of every row. dates: timestamps are dates."""

    names: list[str]
    delimiter: str
    quoting: Quoting
    roles: Roles
    items_path: Path | None = None
    dates: bool = False

    def read(self, block: Block, known: KnownItems | None) -> RowBlock:
        """Reads the rows of a block of text."""
        bad = BadRows(block.file)
        table = parse_table(block, bad, names=self.names, delimiter=self.delimiter, quoting=self.quoting)
        return assemble(table, self.roles, bad, known, self.items_path, dates=self.dates)

    def cut(self, block: Block, size: int) -> list[Block]:
        """Cuts a file into blocks of whole rows."""
        return cut_text(block, quoted_after=self.delimiter if self.quoting == "rfc4180" else None, size=size)

    def num_rows(self, block: Block) -> int:
        """An estimate from the size of the file."""
        return block.data.stat().st_size // _BYTES_A_ROW + 1


def dates_in(path: Path, names: list[str], delimiter: str, quoting: Quoting, column: str | None) -> bool:
    """Whether the first rows of a file, which has a header, hold dates in a column."""
    if column is None:
        return False
    lines = re.split(r"\r\n|[\r\n]", first_bytes(path).decode("utf-8", errors="replace"))[1:]
    rows = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL)
    place = names.index(column)
    return holds_dates(pa.chunked_array([[row[place] for row in rows if len(row) == len(names)]], pa.string()))
