"""Which column plays which role: the one that data.columns names, or the one whose name is commonly used for the role.

Names are compared without case, blanks and punctuation, so `userId`, `user_id` and `User-ID` are one name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rec_dist.data.sources.header import listed
from rec_dist.errors import UserError

NAMES = {
    "user": ("user", "user_id", "customer_id", "visitor_id", "session_id"),
    "item": ("item", "item_id", "movie_id", "product_id", "parent_asin", "asin", "isbn"),
    "rating": ("rating", "score", "overall", "stars"),
    "timestamp": ("timestamp", "time", "date", "created_at", "unix_review_time"),
    "title": ("title", "name", "item_name", "movie_title", "book_title"),
    "categories": ("categories", "category", "genres", "genre", "class"),
    "year": ("year", "release_year"),
}
REQUIRED = ("user", "item")


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


def check_roles(columns: Mapping[str, str]) -> None:
    """Raises UserError if data.columns names a role that does not exist."""
    for role in columns:
        if role not in NAMES:
            raise UserError(f"data.columns.{role} is not a role of a column; the roles are {', '.join(NAMES)}.")


def chosen(
    place: Path | str, header: Sequence[str], columns: Mapping[str, str], role: str, *, required: bool = False
) -> str | None:
    """The column of `place` for a role: the one that data.columns names, or else the one with a name of NAMES, or None.

    Raises UserError if data.columns names a column that is not there, several columns fit, or a required role has none.
    """
    if role in columns:
        if columns[role] not in header:
            raise UserError(
                f"data.columns.{role} ({columns[role]}) is not a column of {place}; its columns are {listed(header)}."
            )
        return columns[role]
    taken = {name for other, name in columns.items() if other != role}
    fits = [name for name in _named(header, role) if name not in taken]
    if len(fits) > 1:
        ways = " or ".join(f"data.columns.{role}={name}" for name in fits)
        raise UserError(f"{place}: the columns {', '.join(fits)} may each be the {role}; set {ways}.")
    if not fits and required:
        names = ", ".join(NAMES[role])
        raise UserError(f"data.columns.{role} is not set, and {place} has none of {names}; its columns are {listed(header)}.")
    return fits[0] if fits else None


def pick(place: Path | str, header: Sequence[str], columns: Mapping[str, str], roles: Iterable[str]) -> dict[str, str | None]:
    """The column of each role, as `chosen` finds it; user and item are required."""
    return {role: chosen(place, header, columns, role, required=role in REQUIRED) for role in roles}


def pick_roles(path: Path, header: Sequence[str], columns: Mapping[str, str], notes: list[str]) -> Roles:
    """The columns of a table of interactions. Adds to `notes` which were taken by a name that is not the role's own."""
    check_roles(columns)
    picked = pick(path, header, columns, NAMES)
    say_taken(path.name, picked, columns, notes)
    if picked["title"] is None:
        notes.append(f"{path.name} has no title column: raw item names are used as titles; data.columns.title names one")
    user, item = picked.pop("user"), picked.pop("item")
    assert user is not None and item is not None, "both are required"
    return Roles(user, item, **picked)


def user_column(place: Path | str, header: Sequence[str]) -> str:
    """The column of users in a file of lists: user_id, or else the one with another name of a user.

    Raises UserError if there is none, or several fit.
    """
    fits = ["user_id"] if "user_id" in header else _named(header, "user")
    if len(fits) > 1:
        raise UserError(f"{place}: the columns {', '.join(fits)} may each be the user; name one of them user_id")
    if not fits:
        raise UserError(f"{place}: the column user_id is missing; its columns are {listed(header)}")
    return fits[0]


def say_taken(name: str, picked: Mapping[str, str | None], columns: Mapping[str, str], notes: list[str]) -> None:
    """Adds one line to `notes` if columns were taken by names that are not those of their roles."""
    taken = {role: column for role, column in picked.items() if column is not None and role not in columns}
    if any(role != column for role, column in taken.items()):
        notes.append(f"{name}: by their names, columns are taken as {', '.join(f'{r}={c}' for r, c in taken.items())}")


def _named(header: Sequence[str], role: str) -> list[str]:
    """The columns that have one of the role's names."""
    known = {_canonical(name) for name in NAMES[role]}
    return [name for name in header if _canonical(name) in known]


def _canonical(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
