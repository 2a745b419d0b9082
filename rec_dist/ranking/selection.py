"""The best k of scored items: exact, and the same on every machine. Equal scores are in ascending order of item ids.

Cost: one pass of torch.topk over the scores, about 1 ns a score on a core. Rows with a tie at the k-th place are sorted whole.

B users, C items of a pool, k items of a list.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rec_dist.evaluation.baselines import Floats
from rec_dist.evaluation.metrics import check_numbers
from rec_dist.runtime.arrays import I32, I64


def best_of(items: I32 | I64, scores: npt.NDArray[np.floating], k: int) -> I64:
    """The places of the best k of items (C,) in any order with scores (C,), the best first: (n,) with n <= k.

    Raises NotFiniteError for a score that is no number.
    """
    check_numbers(scores)
    return np.lexsort((items, -scores.astype(np.float64)))[:k]


def best_of_pool(scores: Floats, left_out: Sequence[I64], k: int) -> list[I64]:
    """As best_of, for each row of scores (B, C) of a pool of ascending items. Overwrites the scores of what is left out.

    left_out[b]: the different places in the pool that row b must not have. Raises NotFiniteError for a score that is no number.
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
    places = np.take_along_axis(places, by_score, axis=1)
    best: list[I64] = list(places)
    for row in np.flatnonzero(unclear).tolist():
        allowed = np.delete(np.arange(size), left_out[row])
        best[row] = allowed[best_of(allowed, scores[row, allowed], k)]
    return best
