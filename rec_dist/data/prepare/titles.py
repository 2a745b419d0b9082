"""Makes titles distinct: one title per item.

A language model knows items only by title, so two items with one title are the same to it. A release year is added only where
the title alone is ambiguous, since it doubles the tokens of a title. Items that share title and year are merged into the first:
in ML-100K, all 18 such pairs are the same film entered twice. A benchmark that counts them as two items needs them apart: then
nothing is merged, and titles stay equal.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from rec_dist.data.sources.interactions import ItemTable
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class DistinctItems:
    """Items (I',) with distinct titles, unless nothing was to be merged.

    new_index (I,): the new number of each old item. num_with_year, num_merged: how many titles got a year, and how many items
    were merged. num_equal: items whose title another item has too.
    """

    items: ItemTable
    new_index: I64
    num_with_year: int
    num_merged: int
    example_merged: str
    num_equal: int = 0


def make_distinct(items: ItemTable, *, merge: bool = True) -> DistinctItems:
    """Adds the year to titles that several items share, then merges items that still share a title into the first of them.

    White space inside titles becomes single blanks. A merged item keeps the raw name and year of the first, and all categories.
    merge=False keeps every item, with its own number. Raises UserError for a title that is only white space.
    """
    titles = [" ".join(title.split()) for title in items.titles]
    for raw, title in zip(items.raw, titles, strict=True):
        if not title:
            raise UserError(f"data.source: the item {raw!r} has an empty title; give it one, or leave its rows out.")
    # Twins (same title and year) count as one; otherwise they would get a year that does not tell them apart.
    years_of: dict[str, set[int | None]] = {}
    for title, year in zip(titles, items.years, strict=True):
        years_of.setdefault(title, set()).add(year)
    dated = [year is not None and len(years_of[title]) > 1 for title, year in zip(titles, items.years, strict=True)]
    full = [f"{t} ({y})" if d else t for t, y, d in zip(titles, items.years, dated, strict=True)]
    if not merge:
        counts = Counter(full)
        table = ItemTable(items.raw, full, items.years, items.categories)
        num_equal = sum(count for count in counts.values() if count > 1)
        return DistinctItems(table, np.arange(len(items), dtype=np.int64), sum(dated), 0, "", num_equal)
    place: dict[str, int] = {}
    new_index = np.array([place.setdefault(title, len(place)) for title in full], dtype=np.int64)
    first = [-1] * len(place)
    categories: list[list[str]] = [[] for _ in place]
    example = ""
    for old, new in enumerate(new_index.tolist()):
        if first[new] < 0:
            first[new] = old
        elif not example:
            example = f"{full[old]!r} is {items.raw[first[new]]!r} and {items.raw[old]!r}"
        categories[new] += [name for name in items.categories[old] if name not in categories[new]]
    table = ItemTable([items.raw[i] for i in first], list(place), [items.years[i] for i in first], categories)
    num_with_year = sum(1 for index in first if dated[index])
    return DistinctItems(table, new_index, num_with_year, len(items) - len(table), example)
