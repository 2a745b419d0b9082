"""The step that all formats share: checks the columns of a block and turns them into rows of users, items, ratings, times."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rec_dist.data.sources.interactions import F32, BadRows, Bool, ItemTable, KnownItems
from rec_dist.data.sources.roles import Roles
from rec_dist.data.sources.table import CATEGORY_SEPARATOR, Table, as_text, is_list
from rec_dist.data.sources.times import TimeFacts, Times, facts_of, has_open_order, read_floats, read_times
from rec_dist.data.sources.titles import parse_year
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class BlockItems:
    """The items that the rows of a block name, without an items file: rows (I,) of each, and the line (I,) of the first.

    other_titles: further titles that rows give an item, as (index into table, title), in the order of the rows.
    """

    table: ItemTable
    rows: I64
    lines: I64
    other_titles: list[tuple[int, str]]


@dataclass(frozen=True)
class RowBlock:
    """The usable rows (R,) of one block, in file order.

    user: an index into users (Arrow strings), which are in the order of their first row.
    item: an index into the source's items file, or into `items` if there is none; these are in the order of their first row.
    timestamp, fraction: as in times.py; fraction None if all are 0. times: the facts about them.
    bad: unreadable rows; their lines count from the first line of the block.
    """

    user: I64
    users: pa.Array
    item: I64
    items: BlockItems | None
    rating: F32 | None
    timestamp: I64 | None
    fraction: I64 | None
    times: TimeFacts
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


def assemble(
    table: Table, roles: Roles, bad: BadRows, known: KnownItems | None, items_path: Path | None, *, dates: bool = False
) -> RowBlock:
    """Checks every row and returns the good ones. known: the items in the items file `items_path`, if the source has one.

    dates: whether a text in the column of timestamps is a date (ISO 8601) and not a number.
    """
    checked = Checked(table, bad)
    user, users = table.codes(roles.user)
    item, names = table.codes(roles.item)
    for column, index, found in ((roles.user, user, users), (roles.item, item, names)):
        filled = pc.not_equal(found, "").to_numpy(zero_copy_only=False)
        if not filled.all():
            checked.require(filled[index], f"empty {column}", column)
    if known is not None and items_path is not None:
        place = pc.fill_null(pc.index_in(names, value_set=known.names), -1).to_numpy(zero_copy_only=False).astype(np.int64)
        item = place[item]
        checked.require(item >= 0, f"item is not in {items_path.name}", roles.item)
        checked.require(known.titled[item], f"item has no title in {items_path.name}", roles.item)
    rating = _ratings(checked, roles.rating)
    times = _times(checked, roles.timestamp, dates=dates)
    good = checked.good
    user, kept_users = in_use(user[good])
    items: BlockItems | None = None
    item = item[good]
    if known is None:
        item, kept_items = in_use(item)
        items = _describe(table, roles, np.flatnonzero(good), item, names.take(pa.array(kept_items)))
    fraction = None if times is None or times.fraction is None else times.fraction[good]
    return RowBlock(
        user=user,
        users=users.take(pa.array(kept_users)),
        item=item,
        items=items,
        rating=None if rating is None else rating[good],
        timestamp=None if times is None else times.whole[good],
        fraction=fraction,
        times=TimeFacts() if times is None else facts_of(times, good),
        bad=bad,
        num_lines=table.num_lines,
    )


def _ratings(checked: Checked, column: str | None) -> F32 | None:
    if column is None:
        return None
    numbers, readable = read_floats(checked.table.column(column))
    checked.require(readable, "rating is not a number", column)
    fits = np.abs(np.where(readable, numbers, 0)) <= np.finfo(np.float32).max
    checked.require(fits, "rating is too large for 32 bits", column)
    return np.where(readable & fits, numbers, 0).astype(np.float32)


def _times(checked: Checked, column: str | None, *, dates: bool) -> Times | None:
    if column is None:
        return None
    cells = checked.table.column(column)
    times = read_times(cells, dates=dates)
    if not times.readable.all():
        checked.require(
            ~has_open_order(cells),
            "timestamp is a date whose order of day and month is ambiguous; write the year first, as 2024-02-01 (ISO 8601)",
            column,
        )
    checked.require(times.readable, f"timestamp is not a {'date (ISO 8601), as in other rows' if dates else 'number'}", column)
    return times


def in_use(index: I64) -> tuple[I64, I64]:
    """Renumbers `index` (R,) in the order of first rows. Returns (new numbers (R,), the old number of each new one)."""
    old, first = np.unique(index, return_index=True)
    old = old[np.argsort(first, kind="stable")]
    new = np.empty(int(old.max()) + 1 if len(old) else 0, dtype=np.int64)
    new[old] = np.arange(len(old))
    return new[index], old.astype(np.int64)


def _describe(table: Table, roles: Roles, rows: I64, item: I64, names: pa.Array) -> BlockItems:
    """Describes each item by the first good row that names it. rows (R,): the good rows; item (R,): their items."""
    raw = names.to_pylist()
    _, first = np.unique(item, return_index=True)
    of_first = pa.array(rows[first])

    def described(column: str | None) -> list[str] | None:
        return None if column is None else [str(text) for text in table.strings(column).take(of_first).to_pylist()]

    titles, years = described(roles.title), described(roles.year)
    items = ItemTable(
        raw=raw,
        titles=raw if titles is None else titles,
        years=[None] * len(raw) if years is None else [parse_year(text) for text in years],
        categories=[[] for _ in raw] if roles.categories is None else _categories(table.column(roles.categories).take(of_first)),
    )
    counts = np.bincount(item, minlength=len(raw)).astype(np.int64)
    return BlockItems(items, counts, table.lines[rows[first]], _other_titles(table, roles.title, rows, item, items))


def _categories(column: pa.ChunkedArray) -> list[list[str]]:
    """The categories of each row: the values of a list, or of a text with "|" between. Nulls and empty names are none."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not is_list(column.type):
        split = [(text or "").split(CATEGORY_SEPARATOR) for text in as_text(column).to_pylist()]
    else:
        split = [[str(name) for name in names or [] if name is not None] for names in column.to_pylist()]
    return [[name.strip() for name in names if name.strip()] for names in split]


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
