"""RecBole atomic files: tab separated, no quoting, a header of `name:type`, NAME.inter beside NAME.item."""

from collections.abc import Mapping
from pathlib import Path

from rec_dist.data.interactions import BadRows, Interactions, ItemTable
from rec_dist.data.readers.assemble import Checked, Roles, assemble, item_index, read_keys, unique_items
from rec_dist.data.readers.columns import check_roles, chosen
from rec_dist.data.readers.table import Table, read_table
from rec_dist.data.titles import parse_year, restore_article, split_year

# RecBole's published data sets name these columns differently; the first that exists is taken.
_NAMES = {
    "user": ("user_id", "session_id"),
    "item": ("item_id",),
    "rating": ("rating",),
    "timestamp": ("timestamp",),
    "title": ("movie_title", "title", "item_name", "name", "book_title"),
    "categories": ("class", "genre", "genres", "categories", "category"),
    "year": ("release_year", "year"),
}
_MOVIE_TITLE = "movie_title"


def read_recbole(inter: Path, item: Path | None, columns: Mapping[str, str], max_bad_rows: int) -> Interactions:
    """Reads a pair of atomic files; columns overrides which column is user, item, rating, timestamp, title, categories, year.

    Without an .item file, or without a title in it, the raw item name is the title, and a note says so.
    """
    check_roles(columns, _NAMES)
    bad = BadRows()
    notes: list[str] = []
    table = read_table(inter, bad, delimiter="\t")
    roles = Roles(
        user=chosen(table, columns, "user", _NAMES["user"], required=True),
        item=chosen(table, columns, "item", _NAMES["item"], required=True),
        rating=chosen(table, columns, "rating", _NAMES["rating"], required=False) or None,
        timestamp=chosen(table, columns, "timestamp", _NAMES["timestamp"], required=False) or None,
    )
    checked = Checked(table, bad)
    keys = read_keys(checked, roles)
    if item is None:
        items = ItemTable(keys.items, keys.items, [None] * len(keys.items), [[] for _ in keys.items])
        notes.append(f"{inter.with_suffix('.item').name} does not exist: raw item names are used as titles")
        index = keys.item
    else:
        items = _read_items(item, columns, bad, notes)
        index = item_index(checked, roles, keys, items, item)
    interactions = assemble(checked, roles, keys, index, items, bad, notes)
    bad.check(max_bad_rows)
    return interactions


def _read_items(path: Path, columns: Mapping[str, str], bad: BadRows, notes: list[str]) -> ItemTable:
    table = read_table(path, bad, delimiter="\t")
    key = chosen(table, columns, "item", _NAMES["item"], required=True)
    title = chosen(table, columns, "title", _NAMES["title"], required="title" in columns)
    raw, titles, years = table.texts(key), *_titles(table, columns, title or key)
    if not title:
        notes.append(f"{path.name} has no title column: raw item names are used as titles; data.columns.title names one")
    category = chosen(table, columns, "categories", _NAMES["categories"], required="categories" in columns)
    categories = [text.split() for text in table.texts(category)] if category else [[] for _ in raw]
    return unique_items(table, key, ItemTable(raw, titles, years, categories), bad)


def _titles(table: Table, columns: Mapping[str, str], title: str) -> tuple[list[str], list[int | None]]:
    """Titles and years. Only `movie_title` has MovieLens' habits: "Matrix, The", and here and there the year in the title."""
    titles = table.texts(title)
    year = chosen(table, columns, "year", _NAMES["year"], required="year" in columns)
    years: list[int | None] = [None] * len(titles)
    if year:
        years = [parse_year(text) for text in table.texts(year)]
    if title != _MOVIE_TITLE:
        return titles, years
    cut = [split_year(text) for text in titles]
    return [restore_article(text) for text, _ in cut], [own or found for own, (_, found) in zip(years, cut, strict=True)]
