"""Draws for many targets at once. The items are those of the single draws (negatives.py), at a twentieth of the time.

n targets, W numbers drawn for each, K items wanted, R rows of items seen, I items of the catalogue.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.runtime.arrays import F64, I32, I64
from rec_dist.runtime.rng import uniform

Flags = npt.NDArray[np.bool_]


class SeenItems:
    """Rows of items that users have seen: row r is items[offsets[r] : offsets[r + 1]]. Costs 8 bytes and a sort an item."""

    def __init__(self, items: I32, offsets: I64, num_items: int) -> None:
        self.items, self.offsets, self.num_items = items, offsets, num_items
        rows, self._length = len(offsets) - 1, int(np.diff(offsets).max(initial=0)) + 1
        self.searchable = rows * num_items * self._length < 1 << 62
        # One number an item, ordered by (row, item, place): a binary search finds whether and when an item was seen.
        row_of = np.repeat(np.arange(rows), np.diff(offsets))
        places = np.arange(len(items)) - offsets[row_of]
        self._codes = np.sort((row_of * num_items + items) * self._length + places)
        twice = np.flatnonzero(self._codes[1:] // self._length == self._codes[:-1] // self._length)
        self.repeats = np.zeros(rows, dtype=bool)  # (R,) rows that hold an item twice
        self.repeats[self._codes[twice] // self._length // num_items] = True

    def has(self, rows: I64, counts: I64, items: I64) -> Flags:
        """(n, W): whether items (n, W) are among the first counts (n,) items of rows (n,)."""
        asked = (rows[:, None] * self.num_items + items) * self._length
        last = np.searchsorted(self._codes, asked + counts[:, None] - 1, side="right") - 1
        found: Flags = (last >= 0) & (self._codes[last] >= asked)
        return found

    def first(self, row: int, count: int) -> I32:
        """A view of the first `count` items of a row."""
        return self.items[self.offsets[row] :][:count]


def draw_outside(
    keys: tuple[Any, ...], num: int, seen: SeenItems, rows: I64, counts: I64, cumulative: F64 | None, held_out: I32
) -> tuple[I32, Flags]:
    """(n, K) distinct items outside the first counts (n,) items of rows (n,), and the targets (n,) for which they were found.

    held_out: items that no row holds, and that are not drawn either.

    keys: integers and arrays (n,), as of a single draw. cumulative: as there. The others, such as those of a crowded catalogue
    or of a row with an item twice, must be drawn one by one. Cost: 6 us a target at K = 15 and 100 items seen; one by one 110.
    """
    picked, whole = np.empty((len(rows), num), dtype=np.int32), np.full(len(rows), num == 0)
    if num == 0 or not seen.searchable or not len(seen.items):
        return picked, whole
    missing = np.flatnonzero(((num + counts + len(held_out)) * 2 < seen.num_items) & ~seen.repeats[rows])
    for width in (num + num // 4 + 4, 2 * num + 8):  # prefixes of the single draw's counter; most targets need the first only
        own = tuple(np.asarray(key)[missing] if np.ndim(key) else key for key in keys)
        draws = uniform(*(np.reshape(key, (-1, 1)) for key in own), np.arange(width))  # (n, W)
        if cumulative is None:
            items = (draws * seen.num_items).astype(np.int64)
        else:
            items = np.searchsorted(cumulative, draws, side="right")
        usable = (
            (items < seen.num_items)
            & ~np.isin(items, held_out)
            & ~seen.has(rows[missing], counts[missing], items)
            & ~_seen_before(items)
        )
        rank = np.cumsum(usable, axis=1)
        done = rank[:, -1] >= num
        picked[missing[done]] = items[usable & (rank <= num) & done[:, None]].reshape(-1, num)
        whole[missing[done]] = True
        missing = missing[~done]
    return picked, whole


def with_more(items: I32, offsets: I64, more: I32) -> tuple[I32, I64]:
    """Each row with more (R, h) items behind it: (items, offsets)."""
    ends = offsets_of(np.diff(offsets) + more.shape[1])
    out = np.empty(ends[-1], dtype=np.int32)
    behind = ends[1:, None] - more.shape[1] + np.arange(more.shape[1])
    own = np.ones(len(out), dtype=bool)
    own[behind] = False
    out[own], out[behind] = items, more
    return out, ends


def _seen_before(items: I64) -> Flags:
    """items (n, W) -> (n, W): whether the same item is further left in its row."""
    width = items.shape[1]
    ordered = np.sort(items * width + np.arange(width), axis=1)
    row, place = np.nonzero(ordered[:, 1:] // width == ordered[:, :-1] // width)
    repeated = np.zeros(items.shape, dtype=bool)
    repeated[row, ordered[row, place + 1] % width] = True
    return repeated
