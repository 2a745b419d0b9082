"""Positives and explicit negatives of each user in time order, and the k-core: pure functions of the rows of a hash partition.

All rows of a user are in one partition. In memory there is one.
Letters: N rows, U users, I items. Everything is vectorised: nothing here loops over rows.
"""

from collections.abc import Callable
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


def ordered(user: I64, item: I64, timestamp: I64, rating: F32 | None, min_rating: float | None) -> tuple[Rows, int]:
    """The rows (N,) of some users in time order, each pair of user and item once, and how many repeats were dropped.

    user, item, timestamp, rating: (N,) in file order. A row rated below min_rating is an explicit negative.
    """
    positive = np.ones(len(user), dtype=bool)
    if rating is not None and min_rating is not None:
        positive = rating >= np.float32(min_rating)
    every = in_time_order(Rows(user, item, timestamp, rating, positive))
    once = first_of_each_pair(every)
    return once, len(every) - len(once)


def core_items(num_items: int, min_item: int, count: Callable[[Bool], I64]) -> Bool:
    """(I,): the items that the k-core leaves.

    count: of the items left (I,), the positives (I,) of each by users who have enough positives of them (in_core). Items with fewer
    than min_item are dropped, again and again until none is.
    """
    left, before = np.ones(num_items, dtype=bool), -1
    while int(left.sum()) != before:
        before = int(left.sum())
        left = left & (count(left) >= max(min_item, 1))
    return left


def in_core(user: I64, item: I64, positive: Bool, left: Bool, min_user: int) -> Bool:
    """(N,): the rows whose item is left (I,) and whose user has min_user positives of such items. All rows of a user are needed."""
    kept = left[item]
    positives = np.bincount(user[kept & positive], minlength=int(user.max()) + 1 if len(user) else 0)
    return kept & (positives >= max(min_user, 1))[user]


def k_core(rows: Rows, min_user: int, min_item: int) -> Rows:
    """Drops users with fewer than min_user positives and items with fewer than min_item, and repeats until nothing changes.

    Explicit negatives do not count; they stay if both their user and their item stay. An item without a positive is dropped.
    """
    num_items = int(rows.item.max()) + 1 if len(rows) else 0

    def count(left: Bool) -> I64:
        kept = in_core(rows.user, rows.item, rows.positive, left, min_user)
        return np.bincount(rows.item[kept & rows.positive], minlength=num_items).astype(np.int64)

    left = core_items(num_items, min_item, count)
    return rows.take(in_core(rows.user, rows.item, rows.positive, left, min_user))


def renumber(values: I64) -> tuple[I64, I64]:
    """Numbers the values that occur densely, in ascending order: returns (new numbers (N,), the old number of each new one)."""
    old, new = np.unique(values, return_inverse=True)
    return new.astype(np.int64), old.astype(np.int64)


def count_ties(user: I64, timestamp: I64) -> tuple[int, int]:
    """For ordered rows: (rows with the same timestamp as the previous row of their user, rows that have a previous row)."""
    same_user = user[1:] == user[:-1]
    tied = same_user & (timestamp[1:] == timestamp[:-1])
    return int(tied.sum()), int(same_user.sum())
