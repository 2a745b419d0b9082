"""The step all formats share: columns of one file, checked row by row, become Interactions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rec_dist.data.interactions import BadRows, Bool, Interactions, ItemTable
from rec_dist.data.readers.table import Table
from rec_dist.stream.trunk import I64


@dataclass(frozen=True)
class Roles:
    """Which columns of the interactions file are what; None where the source has no such column."""

    user: str
    item: str
    rating: str | None = None
    timestamp: str | None = None


class Checked:
    """Which rows of a table are good so far; every check counts the rows it takes away."""

    def __init__(self, table: Table, bad: BadRows) -> None:
        self.table = table
        self.good: Bool = np.ones(len(table.lines), dtype=bool)
        self._bad = bad

    def require(self, condition: Bool, reason: str, column: str) -> None:
        """Rows (R,) where the condition fails become bad for this reason, unless they already are for another."""
        failed = np.flatnonzero(self.good & ~condition)
        if len(failed):
            self._bad.add(reason, self.table.path, self.table.lines[failed], self.table.cell(column, int(failed[0])))
            self.good[failed] = False


@dataclass(frozen=True)
class Keys:
    """User and item of every row (R,), as indices into distinct names."""

    user: I64
    users: list[str]
    item: I64
    items: list[str]


def read_keys(checked: Checked, roles: Roles) -> Keys:
    """The user and item columns; empty names are bad rows."""
    keys = Keys(*checked.table.codes(roles.user), *checked.table.codes(roles.item))
    for column, index, names in ((roles.user, keys.user, keys.users), (roles.item, keys.item, keys.items)):
        filled = np.array([bool(name) for name in names], dtype=bool)
        if not filled.all():
            checked.require(filled[index], f"empty {column}", column)
    return keys


def item_index(checked: Checked, roles: Roles, keys: Keys, items: ItemTable, items_path: Path) -> I64:
    """Each row's index (R,) into `items`; rows whose item stands nowhere in the items file are bad."""
    place = {raw: index for index, raw in enumerate(items.raw)}
    index = np.array([place.get(name, -1) for name in keys.items], dtype=np.int64)[keys.item]
    checked.require(index >= 0, f"item is not in {items_path.name}", roles.item)
    return index


def assemble(
    checked: Checked, roles: Roles, keys: Keys, item: I64, items: ItemTable, bad: BadRows, notes: list[str]
) -> Interactions:
    """Reads ratings and timestamps, drops the bad rows and returns the rest in file order. item (R,) indexes `items`."""
    rating = timestamp = None
    if roles.rating is not None:
        numbers, readable = checked.table.floats(roles.rating)
        checked.require(readable, "rating is not a number", roles.rating)
        rating = numbers.astype(np.float32)
    if roles.timestamp is not None:
        timestamp, readable = checked.table.timestamps(roles.timestamp)
        checked.require(readable, "timestamp is not a number", roles.timestamp)
    good = checked.good
    return Interactions(
        user=keys.user[good],
        item=item[good],
        rating=None if rating is None else rating[good],
        timestamp=None if timestamp is None else timestamp[good],
        raw_users=keys.users,
        items=items,
        bad_rows=dict(bad.counts),
        notes=notes + ([f"unreadable rows left out: {bad.describe()}"] if bad.counts else []),
    )


def unique_items(table: Table, key: str, items: ItemTable, bad: BadRows) -> ItemTable:
    """Keeps the first row of each item; a repeated or empty item name is a bad row."""
    checked = Checked(table, bad)
    names = np.array(items.raw, dtype=object)
    checked.require(np.array([bool(name) for name in items.raw], dtype=bool), f"empty {key}", key)
    seen: dict[str, int] = {}
    first = np.array([seen.setdefault(name, row) == row for row, name in enumerate(names)], dtype=bool)
    checked.require(first, "item stands twice", key)
    kept = np.flatnonzero(checked.good).tolist()
    return ItemTable(
        [items.raw[i] for i in kept],
        [items.titles[i] for i in kept],
        [items.years[i] for i in kept],
        [items.categories[i] for i in kept],
    )
