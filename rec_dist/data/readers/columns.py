"""Any delimited file with a header: data.columns says which column is user, item, rating, timestamp, title, categories, year."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from rec_dist.data.interactions import BadRows, Interactions, ItemTable
from rec_dist.data.readers.assemble import Checked, Keys, Roles, assemble, read_keys
from rec_dist.data.readers.table import Table, read_table
from rec_dist.data.titles import parse_year
from rec_dist.runtime.errors import UserError

_ROLES = ("user", "item", "rating", "timestamp", "title", "categories", "year")
_DELIMITERS = (",", ";", "\t", "|")
_CATEGORY_SEPARATOR = "|"


def check_roles(columns: Mapping[str, str], roles: Iterable[str] = _ROLES) -> None:
    """UserError when data.columns names a role that does not exist."""
    for role in columns:
        if role not in roles:
            raise UserError(f"data.columns.{role} is no role of a column; roles are {', '.join(roles)}.")


def chosen(table: Table, columns: Mapping[str, str], role: str, names: Iterable[str], *, required: bool) -> str:
    """The column that plays `role`: as data.columns says, else the first of `names` that exists, else "".

    UserError: data.columns names a column that the file lacks, or a required role has none.
    """
    named = columns.get(role)
    for name in [named] if named is not None else names:
        if name in table.names:
            return name
    if named is None and not required:
        return ""
    header = ", ".join(table.names)
    if named is not None:
        raise UserError(f"data.columns.{role} ({named}) is no column of {table.path}; its columns are {header}.")
    raise UserError(f"data.columns.{role} is not set, and {table.path} has none of {', '.join(names)}; its columns are {header}.")


def read_columns(path: Path, columns: Mapping[str, str], max_bad_rows: int) -> Interactions:
    """Reads a csv or tsv file (UTF-8, header in the first line, quotes as in RFC 4180), one interaction a row.

    The separator is whichever of , ; tab | the header holds most. A role without an entry in data.columns is played
    by the column of its own name, if there is one. Without a title column the raw item name is the title. Categories
    are separated by "|".
    """
    check_roles(columns)
    bad = BadRows()
    table = read_table(path, bad, delimiter=_delimiter(path), quoted=True)
    picked = {role: chosen(table, columns, role, [role], required=role in ("user", "item")) for role in _ROLES}
    roles = Roles(picked["user"], picked["item"], picked["rating"] or None, picked["timestamp"] or None)
    checked = Checked(table, bad)
    keys = read_keys(checked, roles)
    notes: list[str] = []
    items = _items(table, picked, checked, keys, notes)
    interactions = assemble(checked, roles, keys, keys.item, items, bad, notes)
    bad.check(max_bad_rows)
    return interactions


def _delimiter(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"data.source: the file {path} does not exist.")
    with path.open(encoding="utf-8-sig", errors="replace") as handle:
        header = handle.readline()
    return max(_DELIMITERS, key=header.count)


def _items(table: Table, picked: Mapping[str, str], checked: Checked, keys: Keys, notes: list[str]) -> ItemTable:
    """One entry an item, from the first good row that names it."""
    rows = np.flatnonzero(checked.good)
    first_row = np.zeros(len(keys.items), dtype=np.int64)
    seen, first = np.unique(keys.item[rows], return_index=True)
    first_row[seen] = rows[first]

    def described(role: str) -> list[str] | None:
        if not picked[role]:
            return None
        index, names = table.codes(picked[role])
        if role == "title" and (differing := len(np.unique(np.stack([keys.item[rows], index[rows]]), axis=1).T) - len(seen)):
            notes.append(f"{differing} other titles of items that already had one are ignored")
        return [names[code] for code in index[first_row].tolist()] if names else []

    titles, categories, years = described("title"), described("categories"), described("year")
    if titles is None:
        notes.append(f"{table.path.name} has no title column: raw item names are used as titles; data.columns.title names one")
    return ItemTable(
        raw=keys.items,
        titles=keys.items if titles is None else titles,
        years=[None] * len(keys.items) if years is None else [parse_year(text) for text in years],
        categories=[
            [name.strip() for name in text.split(_CATEGORY_SEPARATOR) if name.strip()]
            for text in categories or [""] * len(keys.items)
        ],
    )
