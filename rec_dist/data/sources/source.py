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
from rec_dist.data.sources.interactions import BadRows, Interactions, ItemTable
from rec_dist.runtime.arrays import I64


class RowReader(Protocol):
    """How to read the rows of a format. Instances are sent to other processes."""

    def read(self, block: Block, known: pa.Array | None) -> RowBlock:
        """Reads the rows of a block. known: the names in the source's items file, if it has one."""

    def cut(self, block: Block, size: int) -> list[Block]:
        """Cuts a whole file into blocks of about `size` bytes of text (or as many rows of Parquet)."""

    def num_rows(self, block: Block) -> int:
        """Estimates the number of rows of a whole file."""


@dataclass(frozen=True)
class Source:
    """files: one block per file, in order. items: the items file; None if there is none and rows name the items themselves.

    header_lines: lines of each file before its first row. bad, notes: about the items file and the source as a whole.
    """

    files: list[Block]
    rows: RowReader
    header_lines: int = 0
    items: ItemTable | None = None
    bad: BadRows = field(default_factory=BadRows)
    notes: list[str] = field(default_factory=list)

    @property
    def known(self) -> pa.Array | None:
        """The names in the items file."""
        return None if self.items is None else pa.array(self.items.raw, pa.string())


class Joined:
    """Joins what the blocks of a source share. Add the blocks in the order of their rows."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._items = source.items if source.items is not None else ItemTable([], [], [], [])
        self._place = {name: index for index, name in enumerate(self._items.raw)} if source.items is None else {}
        self._others: set[tuple[int, str]] = set()
        self._file, self._lines = -1, 0
        self.bad = BadRows()
        self.bad.merge(source.bad, 0)

    def add(self, block: Block, rows: RowBlock) -> I64 | None:
        """Adds a block. Returns the index of each of its items among all items; None if rows.item is that index already."""
        if block.file != self._file:
            self._file, self._lines = block.file, self._source.header_lines
        self.bad.merge(rows.bad, self._lines)
        self._lines += rows.num_lines
        if rows.items is None:
            return None
        index = np.zeros(len(rows.items), dtype=np.int64)
        for local, raw in enumerate(rows.items.raw):
            place = self._place.setdefault(raw, len(self._place))
            index[local] = place
            if place == len(self._items):
                self._items.raw.append(raw)
                self._items.titles.append(rows.items.titles[local])
                self._items.years.append(rows.items.years[local])
                self._items.categories.append(rows.items.categories[local])
            elif self._items.titles[place] != rows.items.titles[local]:
                self._others.add((place, rows.items.titles[local]))
        for local, title in rows.other_titles:
            if self._items.titles[int(index[local])] != title:
                self._others.add((int(index[local]), title))
        return index

    @property
    def items(self) -> ItemTable:
        """The items of the items file, or all items of the blocks so far."""
        return self._items

    def notes(self) -> list[str]:
        """The notes about the source for the manifest."""
        others = [f"{len(self._others)} further titles of items that already have one are ignored"] if self._others else []
        return self._source.notes + others + self.bad.notes()


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
    joined.bad.check(max_bad_rows)
    users, raw_users = _join_users(parts)
    ratings, timestamps = [part.rating for part in parts], [part.timestamp for part in parts]
    return Interactions(
        user=users,
        item=np.concatenate(items),
        rating=np.concatenate([r for r in ratings if r is not None]) if ratings[0] is not None else None,
        timestamp=np.concatenate([t for t in timestamps if t is not None]) if timestamps[0] is not None else None,
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
