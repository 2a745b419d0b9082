"""Book-Crossing (Ziegler et al., WWW 2005) as published: BX-Book-Ratings.csv beside BX-Books.csv, in Latin-1.

A backslash escapes a quote in a cell. There are no timestamps: prepare it with data.split=user_ratio or leave_one_out, and draw
no conclusions from the order of its rows. Titles repeat across editions; years are left out, so that all books with one title
become one item.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from rec_dist.data.sources.assemble import RowBlock, assemble, unique_items
from rec_dist.data.sources.blocks import Block, cut_text, whole
from rec_dist.data.sources.header import read_header, require_columns
from rec_dist.data.sources.interactions import BadRows, ItemTable, KnownItems
from rec_dist.data.sources.roles import Roles
from rec_dist.data.sources.source import Source
from rec_dist.data.sources.table import parse_table

RATINGS, BOOKS = "BX-Book-Ratings.csv", "BX-Books.csv"
_RATING, _TITLE = "Book-Rating", "Book-Title"
_ROLES = Roles("User-ID", "ISBN", _RATING)
_IMPLICIT = "0"
_BYTES_A_ROW = 27


@dataclass(frozen=True)
class BookRatings:
    """Implements RowReader for the explicit ratings, 1 to 10. Leaves out ratings of 0, which only say that a user has a book."""

    names: list[str]
    books: Path

    def read(self, block: Block, known: KnownItems | None) -> RowBlock:
        """Reads the explicit ratings of a block of text."""
        bad = BadRows(block.file)
        table = parse_table(block, bad, names=self.names, delimiter=";", quoting="rfc4180", escaped=True, encoding="latin-1")
        return assemble(table.where(pc.not_equal(table.strings(_RATING), _IMPLICIT)), _ROLES, bad, known, self.books)

    def cut(self, block: Block, size: int) -> list[Block]:
        """Cuts at any line end: no cell of this file holds one, and escaped quotes would mislead a count of quotes."""
        return cut_text(block, quoted_after=None, size=size)

    def num_rows(self, block: Block) -> int:
        """An estimate from the size of the file."""
        return block.data.stat().st_size // _BYTES_A_ROW + 1


def find_book_crossing(source: Path) -> list[Path]:
    """Finds the two files. Returns nothing unless `source` (the folder or the file of ratings) has both."""
    folder = source if source.is_dir() else source.parent
    files = [folder / RATINGS, folder / BOOKS]
    return files if source in (folder, files[0]) and all(path.is_file() for path in files) else []


def open_book_crossing(ratings: Path, books: Path) -> Source:
    """Opens the pair of files. A rating of a book that is not in BX-Books.csv is a bad row."""
    names, skip = read_header(ratings, ";", quoted=True)
    require_columns(ratings, names, (_ROLES.user, _ROLES.item, _RATING))
    bad = BadRows(file=1)
    items = _read_books(books, bad)
    notes = ["ratings of 0 (the user has the book but did not rate it) are left out"]
    return Source([whole(0, ratings, skip)], BookRatings(names, books), header_lines=1, items=items, bad=bad, notes=notes)


def _read_books(path: Path, bad: BadRows) -> ItemTable:
    names, skip = read_header(path, ";", quoted=True)
    require_columns(path, names, (_ROLES.item, _TITLE))
    table = parse_table(
        whole(1, path, skip), bad, names=names, delimiter=";", quoting="rfc4180", escaped=True, encoding="latin-1", lines_before=1
    )
    titles = table.texts(_TITLE)
    items = ItemTable(table.texts(_ROLES.item), titles, [None] * len(titles), [[] for _ in titles])
    return unique_items(table, _ROLES.item, items, bad)
