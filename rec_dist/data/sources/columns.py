"""Any table with a header. data.columns names the columns of user, item, rating, timestamp, title, categories and year."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rec_dist.data.sources.assemble import Roles
from rec_dist.data.sources.blocks import first_bytes, whole
from rec_dist.data.sources.delimited import DelimitedRows
from rec_dist.data.sources.header import listed, read_header
from rec_dist.data.sources.source import Source
from rec_dist.errors import UserError

_ROLES = ("user", "item", "rating", "timestamp", "title", "categories", "year")
_DELIMITERS = (",", ";", "\t", "|")


def check_roles(columns: Mapping[str, str], roles: Iterable[str] = _ROLES) -> None:
    """Raises UserError if data.columns names a role that does not exist."""
    for role in columns:
        if role not in roles:
            raise UserError(f"data.columns.{role} is not a role of a column; the roles are {', '.join(roles)}.")


def chosen(
    path: Path, header: list[str], columns: Mapping[str, str], role: str, names: Iterable[str], *, required: bool
) -> str | None:
    """The column for `role`: the one that data.columns names, or else the first of `names` that exists, or else None.

    Raises UserError if the file lacks the column that data.columns names, or any column for a required role.
    """
    named = columns.get(role)
    for name in [named] if named is not None else names:
        if name in header:
            return name
    if named is None and not required:
        return None
    has = listed(header)
    if named is not None:
        raise UserError(f"data.columns.{role} ({named}) is not a column of {path}; its columns are {has}.")
    raise UserError(f"data.columns.{role} is not set, and {path} has none of {', '.join(names)}; its columns are {has}.")


def pick_roles(path: Path, header: list[str], columns: Mapping[str, str], notes: list[str]) -> Roles:
    """Picks the column of each role. The default for a role is the column with its own name, if there is one."""
    check_roles(columns)
    picked = {role: chosen(path, header, columns, role, [role], required=role in ("user", "item")) for role in _ROLES}
    if picked["title"] is None:
        notes.append(f"{path.name} has no title column: raw item names are used as titles; data.columns.title names one")
    user, item = picked.pop("user"), picked.pop("item")
    assert user is not None and item is not None, "both are required"
    return Roles(user, item, **picked)


def open_csv(path: Path, columns: Mapping[str, str]) -> Source:
    """Opens a csv or tsv file with one interaction per row (UTF-8, header in the first line, quotes as in RFC 4180, also .gz).

    The separator is the one of , ; tab | that is most frequent in the header. Without a title column, the raw item name is the
    title. Categories are separated by "|".
    """
    notes: list[str] = []
    line = first_bytes(path).split(b"\n", 1)[0].decode("utf-8-sig", errors="replace")
    delimiter = max(_DELIMITERS, key=line.count)
    names, skip = read_header(path, delimiter, quoted=True)
    roles = pick_roles(path, names, columns, notes)
    rows = DelimitedRows(names, delimiter, quoted=True, roles=roles)
    return Source([whole(0, path, skip)], rows, header_lines=1, notes=notes)
