"""The items of a catalogue by the names that users give: the item's id in the source, or its title.

Cost: about 250 bytes an item for the table of names.

I items of the catalogue.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.sources.text import same
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32


class ItemNames:
    """Finds items by name. An id goes before a title that reads the same, and of equal titles the first one counts.

    Titles are compared cleaned, with single blanks.
    """

    def __init__(self, data: PreparedData) -> None:
        by_title = {title: item for item, title in reversed(list(enumerate(data.titles)))}
        by_id = {raw: item for item, raw in enumerate(data.raw_items)}
        self._items = {same(title): item for title, item in by_title.items()} | by_title | by_id
        self.num_items = data.num_items

    def find(self, names: Iterable[str]) -> tuple[I32, int]:
        """The items with these names, in their order, and how many names are unknown and left out."""
        numbers = self.numbers(names)
        known = numbers[numbers >= 0]
        return known, len(numbers) - len(known)

    def numbers(self, names: Iterable[str]) -> I32:
        """The item with each name, -1 where there is none."""
        get = self._items.get
        items = []
        for name in names:
            item = get(name)
            if item is None:
                item = get(same(name), -1)
            items.append(item)
        return np.asarray(items, dtype=np.int32)


def item_pool(names: ItemNames, allow: Iterable[str] | None, deny: Iterable[str] | None) -> tuple[I32, list[str]]:
    """The items that may be recommended, ascending, and lines on names that are unknown.

    Raises UserError if nothing is left.
    """
    pool, notes = np.arange(names.num_items, dtype=np.int32), []
    for key, listed in (("--allow", allow), ("--deny", deny)):
        if listed is None:
            continue
        items, unknown = names.find(listed)
        if unknown:
            notes.append(f"{key}: {unknown:,} names are no item of the catalogue and were skipped")
        pool = np.intersect1d(pool, items) if key == "--allow" else np.setdiff1d(pool, items)
        if not len(pool):
            raise UserError(
                f"{key} leaves none of the {names.num_items:,} items to recommend ({unknown:,} of its names are unknown); give "
                "ids or titles of the data set, one a line"
            )
    return pool.astype(np.int32), notes


def read_names(path: Path, key: str) -> list[str]:
    """The lines of a text file of item names, without empty ones. Raises UserError if the file cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        why = getattr(fault, "strerror", None) or f"it is no UTF-8 text: {fault}"
        raise UserError(
            f"{key} ({path}) cannot be read: {why}; give a text file with the id or title of an item a line"
        ) from None
    return [line.strip() for line in text.split("\n") if line.strip()]
