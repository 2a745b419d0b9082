"""Ragged arrays as flat arrays with offsets: pieces of different lengths, one after another. Letters: S pieces."""

import numpy as np

from rec_dist.runtime.arrays import I64


def offsets_of(lengths: I64) -> I64:
    """lengths (S,) -> (S+1,): where each piece begins, and the end of the last."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def runs(starts: I64, lengths: I64) -> I64:
    """lengths[0] consecutive numbers from starts[0] on, then lengths[1] from starts[1] on, and so forth."""
    offsets = offsets_of(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def sums(values: I64, offsets: I64) -> I64:
    """The sum of each piece of values (offsets[-1],): (S,)."""
    return np.diff(offsets_of(values)[offsets])
