"""Ranking metrics with one relevant item per user. Every function returns one number per user; bootstrap.py takes their mean.

Ties count against the target: its rank is 1 + the number of candidates that score higher or the same. So a scorer that gives all
candidates the same score gets the last rank and no credit; with the opposite rule it would look perfect.

U users, C candidates of a user (the target among them), E scores of all users in one flat array.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from rec_dist.errors import NotFiniteError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def target_ranks(scores: npt.ArrayLike, target: npt.ArrayLike = 0) -> Ints:
    """rank_u = 1 + #{c != target_u: score_uc >= score_u,target}: scores (U, C), target (U,) or one index -> (U,) from 1.

    A candidate with score -inf ranks below every finite one, so -inf can pad rows with fewer candidates.
    Raises NotFiniteError for a NaN, ValueError for a wrong shape or a target outside 0..C-1.

    >>> target_ranks([[0.9, 0.1, 0.5], [0.2, 0.2, 0.2]]).tolist()
    [1, 3]
    >>> target_ranks([[0.9, 0.1, 0.5]], target=[2]).tolist()
    [2]
    """
    table = np.asarray(scores)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(f"scores must have shape (users, candidates) with at least 1 candidate, got {table.shape}")
    index = np.asarray(target, dtype=np.int64)
    if index.shape not in ((), (table.shape[0],)):
        raise ValueError(f"target must be one index or have shape ({table.shape[0]},), got {index.shape}")
    if index.size and not 0 <= index.min() <= index.max() < table.shape[1]:
        raise ValueError(f"target must lie in 0..{table.shape[1] - 1}, got {index.min()}..{index.max()}")
    check_numbers(table)
    of_target = table[np.arange(table.shape[0]), index]  # (U,)
    return np.asarray((table >= of_target[:, None]).sum(axis=1), dtype=np.int64)  # the target itself is the 1


def group_ranks(scores: npt.ArrayLike, group_offsets: npt.ArrayLike) -> Ints:
    """As target_ranks, for ragged users: scores (E,), group_offsets (U+1,) -> (U,). The first of each group is the target.

    Raises NotFiniteError for a NaN, ValueError for offsets that do not run from 0 to E with at least 1 score per user.

    >>> group_ranks([0.5, 0.7, 0.1, 2.0], [0, 3, 4]).tolist()
    [2, 1]
    """
    flat, offsets = np.asarray(scores), np.asarray(group_offsets, dtype=np.int64)
    if flat.ndim != 1 or offsets.ndim != 1 or offsets.size == 0 or offsets[0] != 0 or offsets[-1] != flat.size:
        raise ValueError(f"group_offsets must run from 0 to the number of scores; scores have shape {flat.shape}")
    sizes = np.diff(offsets)
    if (sizes < 1).any():
        raise ValueError(f"group {int(np.argmax(sizes < 1))} has no candidate; each needs at least its target")
    check_numbers(flat)
    if sizes.size == 0:
        return np.zeros(0, dtype=np.int64)
    beats = flat >= np.repeat(flat[offsets[:-1]], sizes)  # (E,)
    return np.add.reduceat(beats.astype(np.int64), offsets[:-1])


def hit_rate(ranks: npt.ArrayLike, k: int) -> Floats:
    """hr@k = [rank <= k]: ranks (U,) -> (U,) of 0 and 1.

    >>> hit_rate([1, 3, 11], k=10).tolist()
    [1.0, 1.0, 0.0]
    """
    return (_ranks(ranks) <= _cutoff(k)).astype(np.float64)


def ndcg(ranks: npt.ArrayLike, k: int) -> Floats:
    """ndcg@k = [rank <= k] / log2(1 + rank): ranks (U,) -> (U,). With one relevant item the ideal gain is 1.

    >>> ndcg([1, 3, 11], k=10).tolist()
    [1.0, 0.5, 0.0]
    """
    checked = _ranks(ranks)
    return np.where(checked <= _cutoff(k), 1.0 / np.log2(1.0 + checked), 0.0)


def reciprocal_rank(ranks: npt.ArrayLike) -> Floats:
    """rr = 1 / rank, of which mrr is the mean: ranks (U,) -> (U,).

    >>> reciprocal_rank([1, 4]).tolist()
    [1.0, 0.25]
    """
    return 1.0 / _ranks(ranks)


def auc(ranks: npt.ArrayLike, num_candidates: npt.ArrayLike) -> Floats:
    """auc = (C - rank) / (C - 1), the share of the C - 1 other candidates that score below the target: (U,) -> (U,).

    num_candidates: C, including the target; one number, or (U,). A tie counts 0, not 1/2 as usual (see the module's rule), so a
    constant scorer gets 0 here and 1/2 elsewhere. With C = 2 this is the pairwise accuracy of arXiv 2405.16127. Raises
    ValueError if C < 2 or rank > C.

    >>> auc([1, 2, 3], num_candidates=3).tolist()
    [1.0, 0.5, 0.0]
    """
    checked, candidates = _ranks(ranks), np.asarray(num_candidates, dtype=np.float64)
    if (candidates < 2).any():
        raise ValueError("auc needs at least 2 candidates per user, the target and 1 other")
    if (checked > candidates).any():
        raise ValueError(
            f"rank {checked.max()} is larger than the number of candidates, which is {candidates.min():.0f} at least"
        )
    return np.asarray((candidates - checked) / (candidates - 1.0), dtype=np.float64)


def ranking_metrics(ranks: npt.ArrayLike, num_candidates: npt.ArrayLike, ks: Iterable[int]) -> dict[str, Floats]:
    """All metrics above by their reported names: hr@K and ndcg@K for each K of ks, mrr and auc -> (U,) each.

    >>> {name: float(value.mean()) for name, value in ranking_metrics([1, 3], 5, [1]).items()}
    {'hr@1': 0.5, 'ndcg@1': 0.5, 'mrr': 0.6666666666666666, 'auc': 0.75}
    """
    metrics: dict[str, Floats] = {}
    for k in ks:
        metrics[f"hr@{k}"] = hit_rate(ranks, k)
        metrics[f"ndcg@{k}"] = ndcg(ranks, k)
    return metrics | {"mrr": reciprocal_rank(ranks), "auc": auc(ranks, num_candidates)}


def _ranks(ranks: npt.ArrayLike) -> Ints:
    array = np.asarray(ranks)
    if array.ndim != 1:
        raise ValueError(f"ranks must have shape (users,), got {array.shape}")
    if array.size and (not np.issubdtype(array.dtype, np.integer) or array.min() < 1):
        raise ValueError(f"ranks must be integers from 1, got {array.dtype} with minimum {array.min()}")
    return array.astype(np.int64)


def _cutoff(k: int) -> int:
    if k < 1:
        raise ValueError(f"the cut-off k must be at least 1, got {k}")
    return k


def check_numbers(scores: npt.NDArray[Any]) -> None:
    """Raises NotFiniteError for a score that is no number."""
    if np.isnan(scores).any():
        raise NotFiniteError("the model gives a score that is no number (NaN); train it again with a lower optimizer.lr")
