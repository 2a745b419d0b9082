"""Positives and explicit negatives of each user in time order, and the k-core.

Letters: N rows, U users, I items. Everything is vectorised: nothing here loops over rows.
"""

from dataclasses import dataclass

import numpy as np

from rec_dist.data.sources.interactions import F32, Bool
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class Rows:
    """Rows (N,) ordered by (user, timestamp, file order).

    positive (N,) is False for explicit negatives. rating is None if the source has no ratings.
    """

    user: I64
    item: I64
    timestamp: I64
    rating: F32 | None
    positive: Bool

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: I64 | Bool) -> "Rows":
        """The rows at `index`, in the order of `index`."""
        rating = None if self.rating is None else self.rating[index]
        return Rows(self.user[index], self.item[index], self.timestamp[index], rating, self.positive[index])


def in_time_order(rows: Rows) -> Rows:
    """Orders rows by (user, timestamp). Rows with the same user and timestamp stay in file order."""
    return rows.take(np.lexsort((rows.timestamp, rows.user)))


def first_of_each_pair(rows: Rows) -> Rows:
    """Keeps a user's first row of each item in time order, whatever its rating: later opinions are not known at that time."""
    if len(rows) == 0:
        return rows
    pair = rows.user * (rows.item.max() + 1) + rows.item
    _, first = np.unique(pair, return_index=True)
    return rows.take(np.sort(first))


def k_core(rows: Rows, min_user: int, min_item: int) -> Rows:
    """Drops users with fewer than min_user positives and items with fewer than min_item, and repeats until nothing changes.

    Explicit negatives do not count; they stay if both their user and their item stay. An item without a positive is dropped.
    """
    min_user, min_item = max(min_user, 1), max(min_item, 1)
    while len(rows):
        users = np.bincount(rows.user[rows.positive], minlength=int(rows.user.max()) + 1)
        items = np.bincount(rows.item[rows.positive], minlength=int(rows.item.max()) + 1)
        kept = (users[rows.user] >= min_user) & (items[rows.item] >= min_item)
        if kept.all():
            break
        rows = rows.take(kept)
    return rows


def renumber(values: I64) -> tuple[I64, I64]:
    """Numbers the values that occur densely, in ascending order: returns (new numbers (N,), the old number of each new one)."""
    old, new = np.unique(values, return_inverse=True)
    return new.astype(np.int64), old.astype(np.int64)


def count_ties(user: I64, timestamp: I64) -> tuple[int, int]:
    """For ordered rows: (rows with the same timestamp as the previous row of their user, rows that have a previous row)."""
    same_user = user[1:] == user[:-1]
    tied = same_user & (timestamp[1:] == timestamp[:-1])
    return int(tied.sum()), int(same_user.sum())
