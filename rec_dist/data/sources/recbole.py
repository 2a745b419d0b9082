"""RecBole atomic files: NAME.inter beside NAME.item, separated by tabs, without quoting, with a header of `name:type`."""

from collections.abc import Mapping
from pathlib import Path

from rec_dist.data.sources.assemble import unique_items
from rec_dist.data.sources.blocks import whole
from rec_dist.data.sources.delimited import DelimitedRows, dates_in
from rec_dist.data.sources.header import read_header
from rec_dist.data.sources.interactions import BadRows, ItemTable
from rec_dist.data.sources.roles import Roles, check_roles, chosen, pick
from rec_dist.data.sources.source import Source
from rec_dist.data.sources.table import Table, parse_table
from rec_dist.data.sources.titles import parse_year, restore_article, split_year

_MOVIE_TITLE = "movie_title"
_OF_ROWS = ("user", "item", "rating", "timestamp")


def open_recbole(inter: Path, item: Path | None, columns: Mapping[str, str]) -> Source:
    """Opens a pair of atomic files. `columns` overrides the columns of user, item, rating, timestamp, title, categories and year.

    Without an .item file, or without a title in it, the raw item name is the title, and a note says so.
    """
    check_roles(columns)
    header, skip = read_header(inter, "\t", quoted=False)
    picked = pick(inter, header, {role: name for role, name in columns.items() if role in _OF_ROWS}, _OF_ROWS)
    user, name = picked["user"], picked["item"]
    assert user is not None and name is not None, "both are required"
    roles = Roles(user, name, picked["rating"], picked["timestamp"])
    notes: list[str] = []
    bad, items = BadRows(file=1), None
    if item is None:
        notes.append(f"{inter.with_suffix('.item').name} does not exist: raw item names are used as titles")
    else:
        items = _read_items(item, columns, bad, notes)
    dates = dates_in(inter, header, "\t", "none", roles.timestamp)
    rows = DelimitedRows(header, "\t", "none", roles, items_path=item, dates=dates)
    return Source([whole(0, inter, skip)], rows, header_lines=1, items=items, bad=bad, notes=notes)


def _read_items(path: Path, columns: Mapping[str, str], bad: BadRows, notes: list[str]) -> ItemTable:
    header, skip = read_header(path, "\t", quoted=False)
    table = parse_table(whole(1, path, skip), bad, names=header, delimiter="\t", lines_before=1)

    key = chosen(path, header, columns, "item", required=True)
    assert key is not None, "it is required"
    title, year, category = (chosen(path, header, columns, role) for role in ("title", "year", "categories"))
    raw, titles, years = table.texts(key), *_titles(table, title or key, year)
    if not title:
        notes.append(f"{path.name} has no title column: raw item names are used as titles; data.columns.title names one")
    elif untitled := sum(not text for text in titles):
        notes.append(f"{path.name}: {untitled} items have no title, and rows of them cannot be used")
    categories = [text.split() for text in table.texts(category)] if category else [[] for _ in raw]
    return unique_items(table, key, ItemTable(raw, titles, years, categories), bad)


def _titles(table: Table, title: str, year: str | None) -> tuple[list[str], list[int | None]]:
    """Reads titles and years. Only `movie_title` follows MovieLens: "Matrix, The", and sometimes the year in the title."""
    titles = table.texts(title)
    years: list[int | None] = [None] * len(titles)
    if year:
        years = [parse_year(text) for text in table.texts(year)]
    if title != _MOVIE_TITLE:
        return titles, years
    cut = [split_year(text) for text in titles]
    return [restore_article(text) for text, _ in cut], [own or found for own, (_, found) in zip(years, cut, strict=True)]
