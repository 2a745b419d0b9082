"""The step that all formats share: checks the columns of a block and turns them into rows of users, items, ratings, times."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rec_dist.data.sources.interactions import F32, BadRows, Bool, ItemTable
from rec_dist.data.sources.table import CATEGORY_SEPARATOR, Table
from rec_dist.data.sources.titles import parse_year
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class Roles:
    """The columns of the interactions by their role; None if the source has no such column."""

    user: str
    item: str
    rating: str | None = None
    timestamp: str | None = None
    title: str | None = None
    categories: str | None = None
    year: str | None = None


@dataclass(frozen=True)
class RowBlock:
    """The usable rows (R,) of one block, in file order.

    user: an index into users (Arrow strings), which are in the order of their first row.
    item: an index into the source's items file, or into `items` if there is none; these are in the order of their first row.
    other_titles: further titles that rows of this block give an item, as (index into items, title).
    bad: unreadable rows; their lines count from the first line of the block.
    """

    user: I64
    users: pa.Array
    item: I64
    items: ItemTable | None
    rating: F32 | None
    timestamp: I64 | None
    other_titles: list[tuple[int, str]]
    bad: BadRows
    num_lines: int

    def __len__(self) -> int:
        return len(self.user)


class Checked:
    """The rows of a table that are good so far. Every check counts the rows that it drops."""

    def __init__(self, table: Table, bad: BadRows) -> None:
        self.table = table
        self.good: Bool = np.ones(len(table.lines), dtype=bool)
        self.bad = bad

    def require(self, condition: Bool, reason: str, column: str) -> None:
        """Marks rows as bad for `reason` where condition (R,) is false, unless they are bad already."""
        failed = np.flatnonzero(self.good & ~condition)
        if len(failed):
            self.bad.add(reason, self.table.path, self.table.lines[failed], self.table.cell(column, int(failed[0])))
            self.good[failed] = False


def assemble(table: Table, roles: Roles, bad: BadRows, known: pa.Array | None, items_path: Path | None) -> RowBlock:
    """Checks every row and returns the good ones. known: the names in the items file `items_path`, if the source has one."""
    checked = Checked(table, bad)
    user, users = table.codes(roles.user)
    item, names = table.codes(roles.item)
    for column, index, found in ((roles.user, user, users), (roles.item, item, names)):
        filled = pc.not_equal(found, "").to_numpy(zero_copy_only=False)
        if not filled.all():
            checked.require(filled[index], f"empty {column}", column)
    if known is not None and items_path is not None:
        place = pc.fill_null(pc.index_in(names, value_set=known), -1).to_numpy(zero_copy_only=False).astype(np.int64)
        item = place[item]
        checked.require(item >= 0, f"item is not in {items_path.name}", roles.item)
    rating, timestamp = _numbers(checked, roles)
    good = checked.good
    user, kept_users = in_use(user[good])
    items: ItemTable | None = None
    other_titles: list[tuple[int, str]] = []
    item = item[good]
    if known is None:
        item, kept_items = in_use(item)
        items, other_titles = _describe(table, roles, np.flatnonzero(good), item, names.take(pa.array(kept_items)))
    return RowBlock(
        user=user,
        users=users.take(pa.array(kept_users)),
        item=item,
        items=items,
        rating=None if rating is None else rating[good],
        timestamp=None if timestamp is None else timestamp[good],
        other_titles=other_titles,
        bad=bad,
        num_lines=table.num_lines,
    )


def _numbers(checked: Checked, roles: Roles) -> tuple[F32 | None, I64 | None]:
    rating = timestamp = None
    if roles.rating is not None:
        numbers, readable = checked.table.floats(roles.rating)
        checked.require(readable, "rating is not a number", roles.rating)
        fits = np.abs(np.where(readable, numbers, 0)) <= np.finfo(np.float32).max
        checked.require(fits, "rating is too large for 32 bits", roles.rating)
        rating = np.where(readable & fits, numbers, 0).astype(np.float32)
    if roles.timestamp is not None:
        timestamp, readable = checked.table.timestamps(roles.timestamp)
        checked.require(readable, "timestamp is not a number", roles.timestamp)
    return rating, timestamp


def in_use(index: I64) -> tuple[I64, I64]:
    """Renumbers `index` (R,) in the order of first rows. Returns (new numbers (R,), the old number of each new one)."""
    old, first = np.unique(index, return_index=True)
    old = old[np.argsort(first, kind="stable")]
    new = np.empty(int(old.max()) + 1 if len(old) else 0, dtype=np.int64)
    new[old] = np.arange(len(old))
    return new[index], old.astype(np.int64)


def _describe(table: Table, roles: Roles, rows: I64, item: I64, names: pa.Array) -> tuple[ItemTable, list[tuple[int, str]]]:
    """Describes each item by the first good row that names it. rows (R,): the good rows; item (R,): their items."""
    raw = names.to_pylist()
    _, first = np.unique(item, return_index=True)

    def described(column: str | None) -> list[str] | None:
        if column is None:
            return None
        return [str(text) for text in table.strings(column).take(pa.array(rows[first])).to_pylist()]

    titles, categories, years = described(roles.title), described(roles.categories), described(roles.year)
    items = ItemTable(
        raw=raw,
        titles=raw if titles is None else titles,
        years=[None] * len(raw) if years is None else [parse_year(text) for text in years],
        categories=[
            [name.strip() for name in text.split(CATEGORY_SEPARATOR) if name.strip()] for text in categories or [""] * len(raw)
        ],
    )
    return items, _other_titles(table, roles.title, rows, item, items)


def _other_titles(table: Table, column: str | None, rows: I64, item: I64, items: ItemTable) -> list[tuple[int, str]]:
    if column is None:
        return []
    index, texts = table.codes(column)
    pairs = np.unique(item * max(len(texts), 1) + index[rows])
    if len(pairs) == len(items):
        return []
    named = [(int(pair // len(texts)), str(texts[int(pair % len(texts))].as_py())) for pair in pairs]
    return [(place, title) for place, title in named if title != items.titles[place]]


def unique_items(table: Table, key: str, items: ItemTable, bad: BadRows) -> ItemTable:
    """Keeps the first row of each item. A row with a repeated or empty item name is bad."""
    checked = Checked(table, bad)
    checked.require(np.array([bool(name) for name in items.raw], dtype=bool), f"empty {key}", key)
    seen: dict[str, int] = {}
    first = np.array([seen.setdefault(name, row) == row for row, name in enumerate(items.raw)], dtype=bool)
    checked.require(first, "item is repeated", key)
    return items.take(np.flatnonzero(checked.good))
