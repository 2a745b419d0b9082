"""The best k of scored items: exact, and the same on every machine. Equal scores are in ascending order of item ids.

Cost: one pass of torch.topk over the scores, about 1 ns a score on a core. Rows with a tie at the k-th place are sorted whole.

B users, C items of a pool, k items of a list.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rec_dist.errors import NotFiniteError
from rec_dist.evaluation.baselines import Floats
from rec_dist.runtime.arrays import I32, I64

Best = tuple[I32, Floats]  # items (n,) and their scores (n,), the best first; n <= k


def best_of(items: I32, scores: npt.NDArray[np.floating], k: int) -> Best:
    """The best k of items (C,) in any order with scores (C,): all of them, in order, if C <= k.

    Raises NotFiniteError for a score that is no number.
    """
    check_numbers(scores)
    order = np.lexsort((items, -scores.astype(np.float64)))[:k]
    return items[order], scores[order].astype(np.float64)


def best_of_pool(pool: I32, scores: Floats, left_out: Sequence[I64], k: int) -> list[Best]:
    """The best k of a pool (C,) of ascending items for each row of scores (B, C), which this overwrites.

    left_out[b]: the different places in the pool that row b must not have. A row has fewer than k items if fewer are left.
    Raises NotFiniteError for a score that is no number.
    """
    num_rows, size = scores.shape
    counts = np.asarray([len(places) for places in left_out], dtype=np.int64)
    rows = np.repeat(np.arange(num_rows), counts)
    scores[rows, np.concatenate([*left_out, np.empty(0, dtype=np.int64)])] = -np.inf
    if size <= k:
        places = np.broadcast_to(np.arange(size), (num_rows, size))
        values, unclear = scores, np.isneginf(scores).any(axis=1)
    else:
        found = torch.from_numpy(scores).topk(k + 1, dim=1)  # the next one shows whether the k-th place is tied
        values, places = found.values.numpy(), found.indices.numpy()
        unclear = (values[:, k - 1] == values[:, k]) | np.isneginf(values[:, k - 1])
        values, places = values[:, :k], places[:, :k]
    check_numbers(values)  # torch ranks NaN above every number
    by_place = np.argsort(places, axis=1)
    places, values = np.take_along_axis(places, by_place, axis=1), np.take_along_axis(values, by_place, axis=1)
    by_score = np.argsort(-values, axis=1, kind="stable")
    places, values = np.take_along_axis(places, by_score, axis=1), np.take_along_axis(values, by_score, axis=1)
    best: list[Best] = list(zip(pool[places], values, strict=True))
    for row in np.flatnonzero(unclear).tolist():
        allowed = np.ones(size, dtype=bool)
        allowed[left_out[row]] = False
        best[row] = best_of(pool[allowed], scores[row, allowed], k)
    return best


def check_numbers(scores: npt.NDArray[np.floating]) -> None:
    """Raises NotFiniteError for a score that is no number."""
    if np.isnan(scores).any():
        raise NotFiniteError("the model gives a score that is no number (NaN); train it again with a lower optimizer.lr")
