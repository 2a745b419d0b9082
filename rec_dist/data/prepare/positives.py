"""From rows to ordered choices: what a user chose, what they disliked, in which order, and who is left after the k-core.

Letters: R raw rows, N rows after a step, U users, I items. All vectorised: nothing here loops over rows.
"""

from dataclasses import dataclass

import numpy as np

from rec_dist.data.sources.interactions import F32, Bool
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class Rows:
    """Rows (N,) ordered by (user, timestamp, file order).

    chosen (N,) is False for dislikes. rating is None where there are none.
    """

    user: I64
    item: I64
    timestamp: I64
    rating: F32 | None
    chosen: Bool

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: I64 | Bool) -> "Rows":
        """The rows at `index`, in its order."""
        rating = None if self.rating is None else self.rating[index]
        return Rows(self.user[index], self.item[index], self.timestamp[index], rating, self.chosen[index])


def in_time_order(rows: Rows) -> Rows:
    """Orders rows by (user, timestamp); rows of one user and second stay in file order."""
    return rows.take(np.lexsort((rows.timestamp, rows.user)))


def first_of_each_pair(rows: Rows) -> Rows:
    """Keeps a user's first row of an item, in time order, whatever its rating: later opinions are not known at that time."""
    if len(rows) == 0:
        return rows
    pair = rows.user * (rows.item.max() + 1) + rows.item
    _, first = np.unique(pair, return_index=True)
    return rows.take(np.sort(first))


def k_core(rows: Rows, min_user: int, min_item: int) -> Rows:
    """Drops users with fewer than min_user choices and items with fewer than min_item, again and again until none is left.

    Dislikes do not count; they stay where both their user and their item stay. An item nobody chose is not in the catalogue.
    """
    min_user, min_item = max(min_user, 1), max(min_item, 1)
    while len(rows):
        users = np.bincount(rows.user[rows.chosen], minlength=int(rows.user.max()) + 1)
        items = np.bincount(rows.item[rows.chosen], minlength=int(rows.item.max()) + 1)
        kept = (users[rows.user] >= min_user) & (items[rows.item] >= min_item)
        if kept.all():
            break
        rows = rows.take(kept)
    return rows


def renumber(values: I64) -> tuple[I64, I64]:
    """Dense numbers for the values that occur, in the order of the old numbers: (new (N,), old number of each new one)."""
    old, new = np.unique(values, return_inverse=True)
    return new.astype(np.int64), old.astype(np.int64)


def count_ties(user: I64, timestamp: I64) -> tuple[int, int]:
    """Of ordered rows: (how many have the timestamp of the same user's row before, how many have such a row)."""
    same_user = user[1:] == user[:-1]
    tied = same_user & (timestamp[1:] == timestamp[:-1])
    return int(tied.sum()), int(same_user.sum())
