"""Draws the items of a sampled softmax, once per global step for all its positions, ranks and micro-batches.

Sharing them takes S rows of the item table per step instead of S per position, and makes the loss independent of packing and
the number of workers. Cost: S binary searches in a table of I floats.
"""

import numpy as np

from rec_dist.runtime.arrays import I64
from rec_dist.runtime.rng import uniform

_SAMPLED = 31  # its own stream of draws


class ItemSampler:
    """Draws with replacement from q_i ~ train_count_i + 1. Popular items weigh most in a softmax, and no item has probability 0.

    train_counts (I,). The draws are a pure function of (seed, step).
    """

    def __init__(self, num: int, seed: int, train_counts: I64) -> None:
        weights = train_counts.astype(np.float64) + 1.0
        self._num, self._seed = num, seed
        self._probability = weights / weights.sum()  # (I,)
        self._cumulative = np.cumsum(self._probability)

    def draw(self, step: int) -> tuple[I64, np.ndarray[tuple[int], np.dtype[np.float64]]]:
        """Draws S items and returns (items (S,), log(S * q) of each (S,) in nats)."""
        draws = uniform(self._seed, _SAMPLED, step, np.arange(self._num))
        last = len(self._cumulative) - 1  # rounding can leave the sum below 1
        items = np.searchsorted(self._cumulative, draws, side="right").clip(max=last)
        return items.astype(np.int64), np.log(self._num * self._probability[items])
