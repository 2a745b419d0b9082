"""The items that a sampled softmax is estimated from: one draw a global step, shared by every position, rank and micro-batch of it.

Why shared: S rows of the item table a step in place of S a position, and a loss that neither packing nor the
number of workers changes. Cost: S binary searches in a table of I floats.
"""

import numpy as np

from rec_dist.runtime.arrays import I64
from rec_dist.runtime.rng import uniform

_SAMPLED = 31  # its own stream of draws


class ItemSampler:
    """Draws with replacement from q_i ~ train_count_i + 1: popular items weigh most in a softmax, and none is left out.

    train_counts (I,). The draws are a pure function of (seed, step).
    """

    def __init__(self, num: int, seed: int, train_counts: I64) -> None:
        weights = train_counts.astype(np.float64) + 1.0
        self._num, self._seed = num, seed
        self._probability = weights / weights.sum()  # (I,)
        self._cumulative = np.cumsum(self._probability)

    def draw(self, step: int) -> tuple[I64, np.ndarray[tuple[int], np.dtype[np.float64]]]:
        """(items (S,), log(S * q) of each (S,)), in nats."""
        draws = uniform(self._seed, _SAMPLED, step, np.arange(self._num))
        items = np.searchsorted(self._cumulative, draws, side="right").clip(
            max=len(self._cumulative) - 1
        )  # a sum may fall short of 1
        return items.astype(np.int64), np.log(self._num * self._probability[items])
