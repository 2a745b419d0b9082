"""Exact selection from parts that do not fit into memory together: a quantile of timestamps, the smallest few-shot draws."""

from collections.abc import Sequence

import numpy as np

from rec_dist.runtime.arrays import I64

F64 = np.ndarray[tuple[int], np.dtype[np.float64]]
Lowest = tuple[F64, I64]  # the smallest few-shot draws of a part, and the users that drew them


def nth_smallest(ordered: Sequence[I64], place: int) -> int:
    """The value at `place` (0-based) in the sorted union of several ascending arrays, by bisection: 64 searches per array."""
    filled = [values for values in ordered if len(values)]
    low, high = min(int(values[0]) for values in filled), max(int(values[-1]) for values in filled)
    while low < high:
        middle = (low + high) // 2
        if sum(int(np.searchsorted(values, middle, side="right")) for values in filled) > place:
            high = middle
        else:
            low = middle + 1
    return low


def last_of_few_shot(lowest: Sequence[Lowest], limit: int | None) -> tuple[float, int] | None:
    """The last of the `limit` smallest (draw, user) pairs; None if all users train. Each part gives only its `limit` smallest."""
    if limit is None:
        return None
    draws, users = (np.concatenate([part[place] for part in lowest]) for place in (0, 1))
    if limit > len(draws):
        return None
    last = np.lexsort((users, draws))[limit - 1]
    return float(draws[last]), int(users[last])
