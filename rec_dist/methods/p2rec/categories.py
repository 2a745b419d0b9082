"""Latent categories: k-means on a recommender's item embeddings, and each user's share of every category.

Items without a training row still have their random initial embedding. They form no cluster; each goes to the nearest one. One
thread and float64 give every worker the same clusters. Cost: I * C * D multiply-adds a round; from 100,000 items on,
mini-batches.

I items, D width, C categories.
"""

import numpy as np
import numpy.typing as npt

from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32, I64
from rec_dist.runtime.rng import permute

_SHUFFLE = 41  # the stream of random draws of this module
_MINI_BATCHES_FROM, _BATCH, _STARTS = 100_000, 4096, 4


def item_categories(embeddings: npt.NDArray[np.float32], train_counts: I64, *, num_categories: int, seed: int) -> I32:
    """embeddings (I, D), train_counts (I,) -> (I,) in 0..C-1.

    Raises UserError if fewer items than categories have training rows, or if an embedding is not finite.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    trained = train_counts > 0
    if num_categories > (available := int(trained.sum())):
        raise UserError(
            f"task.p2rec.num_categories ({num_categories}) is more than the {available} items that training rows hold; lower it"
        )
    vectors = np.asarray(embeddings, dtype=np.float64)
    if not np.isfinite(vectors).all():
        raise UserError("task.p2rec.teacher holds item embeddings that are not finite; train another, with a lower optimizer.lr")
    kmeans: KMeans | MiniBatchKMeans = (
        KMeans(num_categories, n_init=_STARTS, random_state=seed)
        if available < _MINI_BATCHES_FROM
        else MiniBatchKMeans(num_categories, n_init=_STARTS, batch_size=_BATCH, random_state=seed)
    )
    with threadpool_limits(limits=1):
        found: I32 = kmeans.fit(vectors[trained]).predict(vectors).astype(np.int32)
    return found


def shuffled(categories: I32, train_counts: I64, *, seed: int) -> I32:
    """The categories, permuted among the items with training rows: the same sizes without the meaning."""
    trained = np.flatnonzero(train_counts > 0)
    mixed = categories.copy()
    mixed[trained] = categories[trained[permute(np.arange(len(trained)), len(trained), seed, _SHUFFLE)]]
    return mixed


def preference(categories: I32, items: I32, num_categories: int) -> npt.NDArray[np.float32]:
    """g_u (C,): the share of each category among a user's items (n >= 1,)."""
    return (np.bincount(categories[items], minlength=num_categories) / len(items)).astype(np.float32)
