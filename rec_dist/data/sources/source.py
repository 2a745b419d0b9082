"""An opened source: its files, how to read a block of rows, its items file, and how to join blocks.

With this split it does not matter who reads a block and when: one process can read all, or many processes of a cluster. What
blocks share (items, bad rows, notes) is joined in the order of the blocks, so the result does not depend on how files were cut.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from rec_dist.data.sources.assemble import RowBlock
from rec_dist.data.sources.blocks import Block
from rec_dist.data.sources.interactions import BadRows, Fault, Interactions, ItemTable, KnownItems
from rec_dist.data.sources.text import Cleaning, clean
from rec_dist.data.sources.times import TimeFacts, scaled
from rec_dist.runtime.arrays import I64


class RowReader(Protocol):
    """How to read the rows of a format. Instances are sent to other processes."""

    def read(self, block: Block, known: KnownItems | None) -> RowBlock:
        """Reads the rows of a block. known: the items in the source's items file, if it has one."""

    def cut(self, block: Block, size: int) -> list[Block]:
        """Cuts a whole file into blocks of about `size` bytes of text (or as many rows of Parquet)."""

    def num_rows(self, block: Block) -> int:
        """Estimates the number of rows of a whole file."""


@dataclass(frozen=True)
class Source:
    """files: one block per file, in order. items: the items file; None if there is none and rows name the items themselves.

    header_lines: lines of each file before its first row. bad, notes: about the items file and the source as a whole.
    clean_text: data.clean_text.
    """

    files: list[Block]
    rows: RowReader
    header_lines: int = 0
    items: ItemTable | None = None
    bad: BadRows = field(default_factory=BadRows)
    notes: list[str] = field(default_factory=list)
    clean_text: bool = True

    @property
    def known(self) -> KnownItems | None:
        """What readers need of the items file."""
        if self.items is None:
            return None
        titled = np.array([_has_text(title) for title in self.items.titles], dtype=bool)
        return KnownItems(pa.array(self.items.raw, pa.string()), titled)


class Joined:
    """Joins what the blocks of a source share. Add the blocks in the order of their rows, then call finish.

    times: the facts about all timestamps. num_untitled_rows: rows that finish counts as bad.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._items = source.items if source.items is not None else ItemTable([], [], [], [])
        self._place = {name: index for index, name in enumerate(self._items.raw)} if source.items is None else {}
        self._rows: list[int] = []  # of each item, without an items file
        self._first: list[Fault] = []  # where its first row is
        self._others: set[tuple[int, str]] = set()
        self._file, self._lines = -1, 0
        self._notes: list[str] = []
        self.times = TimeFacts()
        self.num_untitled_rows = 0
        self.bad = BadRows()
        self.bad.merge(source.bad, 0)

    def add(self, block: Block, rows: RowBlock) -> I64 | None:
        """Adds a block. Returns the index of each of its items among all items; None if rows.item is that index already."""
        if block.file != self._file:
            self._file, self._lines = block.file, self._source.header_lines
        before = self._lines
        self.bad.merge(rows.bad, before)
        self._lines += rows.num_lines
        self.times = self.times.joined(rows.times)
        if rows.items is None:
            return None
        table = rows.items.table
        index = np.zeros(len(table), dtype=np.int64)
        for local, (raw, count, line) in enumerate(
            zip(table.raw, rows.items.rows.tolist(), rows.items.lines.tolist(), strict=True)
        ):
            place = self._place.setdefault(raw, len(self._place))
            index[local] = place
            if place == len(self._items):
                self._items.raw.append(raw)
                self._items.titles.append(table.titles[local])
                self._items.years.append(table.years[local])
                self._items.categories.append(table.categories[local])
                self._rows.append(count)
                self._first.append(Fault(block.file, block.path, line + before, raw))
            else:
                self._rows[place] += count
                self._also(place, table.titles[local])
        for local, title in rows.items.other_titles:
            self._also(int(index[local]), title)
        return index

    def _also(self, place: int, title: str) -> None:
        """Another row of an item has this title: it is taken if the item has none."""
        own = self._items.titles[place]
        if title == own or not _has_text(title):
            return
        if not _has_text(own):
            self._items.titles[place] = title
        elif not self._source.clean_text or clean(title) != clean(own):
            self._others.add((place, title))

    def finish(self, max_bad_rows: int) -> None:
        """Cleans the items, and counts the rows of those without a title as bad. Raises UserError for too many bad rows."""
        untitled = [place for place in range(len(self._rows)) if not _has_text(self._items.titles[place])]
        for place in untitled:
            self.bad.put("item has no title", self._rows[place], self._first[place])
        self.bad.check(max_bad_rows)
        titles, categories = (Cleaning(what, self._source.clean_text) for what in ("titles", "categories"))
        self._items = ItemTable(
            self._items.raw,
            [titles(title) if _has_text(title) else "" for title in self._items.titles],
            self._items.years,
            [[categories(name) for name in names] for names in self._items.categories],
        )
        self.num_untitled_rows = sum(self._rows[place] for place in untitled)
        self._notes += titles.notes() + categories.notes() + self.times.notes()
        if untitled:
            self._notes.append(f"{len(untitled)} items have no title in any of their rows, which are left out")

    @property
    def items(self) -> ItemTable:
        """The items of the items file, or all items of the blocks so far."""
        return self._items

    def notes(self) -> list[str]:
        """The notes about the source for the manifest."""
        others = [f"{len(self._others)} further titles of items that already have one are ignored"] if self._others else []
        return self._source.notes + self._notes + others + self.bad.notes()


def _has_text(title: str) -> bool:
    return bool(clean(title).strip())


def read_all(source: Source, max_bad_rows: int) -> Interactions:
    """Reads all rows of a source into memory. Raises UserError if more than max_bad_rows rows are unreadable."""
    joined, known = Joined(source), source.known
    parts: list[RowBlock] = []
    items: list[I64] = []
    for block in source.files:
        rows = source.rows.read(block, known)
        index = joined.add(block, rows)
        parts.append(rows)
        items.append(rows.item if index is None else index[rows.item])
    joined.finish(max_bad_rows)
    users, raw_users = _join_users(parts)
    ratings = [part.rating for part in parts if part.rating is not None]
    times = [scaled(part.timestamp, part.fraction, joined.times.digits) for part in parts if part.timestamp is not None]
    return Interactions(
        user=users,
        item=np.concatenate(items),
        rating=np.concatenate(ratings) if ratings else None,
        timestamp=np.concatenate(times) if times else None,
        raw_users=raw_users,
        items=joined.items,
        bad_rows=joined.bad.in_order(),
        notes=joined.notes(),
    )


def _join_users(parts: list[RowBlock]) -> tuple[I64, list[str]]:
    """Returns (the user of every row, the names of the users in the order of their first row)."""
    if len(parts) == 1:
        return parts[0].user, parts[0].users.to_pylist()
    return join_names((part.users, part.user) for part in parts)


def join_names(parts: Iterable[tuple[pa.Array, I64]]) -> tuple[I64, list[str]]:
    """Joins parts of (names, rows (R,) that index them) into one index over all names, in the order of their first row."""
    place: dict[str, int] = {}
    joined = [
        np.array([place.setdefault(name, len(place)) for name in names.to_pylist()], dtype=np.int64)[index]
        for names, index in parts
    ]
    return np.concatenate(joined), list(place)
