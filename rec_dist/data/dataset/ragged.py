"""Ragged arrays as flat ones: pieces of different lengths one after another, and where each begins. Letters: S pieces."""

import numpy as np

from rec_dist.runtime.arrays import I64


def offsets_of(lengths: I64) -> I64:
    """lengths (S,) -> (S+1,): where each of them begins, and the end."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def runs(starts: I64, lengths: I64) -> I64:
    """starts[0], starts[0] + 1, ... lengths[0] of them, then the run of starts[1], ..."""
    offsets = offsets_of(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
