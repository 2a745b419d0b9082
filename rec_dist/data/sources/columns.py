"""Any table with a header: data.columns says which column is user, item, rating, timestamp, title, categories, year."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rec_dist.data.sources.assemble import Roles
from rec_dist.data.sources.blocks import first_bytes, whole
from rec_dist.data.sources.delimited import DelimitedRows
from rec_dist.data.sources.header import read_header, shown
from rec_dist.data.sources.source import Source
from rec_dist.errors import UserError

_ROLES = ("user", "item", "rating", "timestamp", "title", "categories", "year")
_DELIMITERS = (",", ";", "\t", "|")


def check_roles(columns: Mapping[str, str], roles: Iterable[str] = _ROLES) -> None:
    """UserError when data.columns names a role that does not exist."""
    for role in columns:
        if role not in roles:
            raise UserError(f"data.columns.{role} is no role of a column; roles are {', '.join(roles)}.")


def chosen(
    path: Path, header: list[str], columns: Mapping[str, str], role: str, names: Iterable[str], *, required: bool
) -> str | None:
    """The column that plays `role`: as data.columns says, else the first of `names` that exists, else None.

    UserError: data.columns names a column that the file lacks, or a required role has none.
    """
    named = columns.get(role)
    for name in [named] if named is not None else names:
        if name in header:
            return name
    if named is None and not required:
        return None
    has = shown(header)
    if named is not None:
        raise UserError(f"data.columns.{role} ({named}) is no column of {path}; its columns are {has}.")
    raise UserError(f"data.columns.{role} is not set, and {path} has none of {', '.join(names)}; its columns are {has}.")


def pick_roles(path: Path, header: list[str], columns: Mapping[str, str], notes: list[str]) -> Roles:
    """A role without an entry in data.columns is played by the column of its own name, if there is one."""
    check_roles(columns)
    picked = {role: chosen(path, header, columns, role, [role], required=role in ("user", "item")) for role in _ROLES}
    if picked["title"] is None:
        notes.append(f"{path.name} has no title column: raw item names are used as titles; data.columns.title names one")
    user, item = picked.pop("user"), picked.pop("item")
    assert user is not None and item is not None, "both are required"
    return Roles(user, item, **picked)


def open_csv(path: Path, columns: Mapping[str, str]) -> Source:
    """A csv or tsv file, packed or not (UTF-8, header in the first line, quotes as in RFC 4180), one interaction a row.

    The separator is whichever of , ; tab | the header holds most. Without a title column the raw item name is the title.
    Categories are separated by "|".
    """
    notes: list[str] = []
    line = first_bytes(path).split(b"\n", 1)[0].decode("utf-8-sig", errors="replace")
    delimiter = max(_DELIMITERS, key=line.count)
    names, skip = read_header(path, delimiter, quoted=True)
    roles = pick_roles(path, names, columns, notes)
    rows = DelimitedRows(names, delimiter, quoted=True, roles=roles)
    return Source([whole(0, path, skip)], rows, header_lines=1, notes=notes)
