"""Stateless randomness: every draw is a pure function of integers (seed, epoch, user, position, ...).

Why: a run that resumes, or runs on another number of workers, must make the same draws, and there is no generator state to save.
The mixer is splitmix64 (Steele et al., 2014), vectorised over NumPy arrays: about 100 million draws per second.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: U64) -> U64:
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def hash_u64(*keys: Any) -> U64:
    """Mixes integers or integer arrays (broadcast together; negative ones wrap) into uniform uint64 of the broadcast shape."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            key64 = np.asarray(key).astype(np.int64).view(np.uint64)
            state = _mix(np.asarray(state + _GOLDEN, dtype=np.uint64) ^ _mix(np.asarray(key64 + _GOLDEN, dtype=np.uint64)))
    return state


def uniform(*keys: Any) -> npt.NDArray[np.float64]:
    """Like hash_u64, but floats in [0, 1) with 53 bits."""
    return (hash_u64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: npt.NDArray[np.int64], size: int, *keys: int) -> npt.NDArray[np.int64]:
    """Position `index` of a pseudo-random permutation of range(size), in O(1) memory: a 4-round Feistel network, cycle-walked.

    index (I,) int64 in 0..size-1 -> (I,) int64, a bijection for each (size, keys). No list is ever shuffled.
    """
    if size <= 1:
        return np.zeros_like(index)
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    out = index.astype(np.uint64)
    walking = np.ones(out.shape, dtype=bool)
    while walking.any():  # the domain is at most 4 * size, so each walk is a few steps
        left, right = out[walking] >> np.uint64(half), out[walking] & mask
        for round_number in range(4):
            left, right = right, left ^ (hash_u64(*keys, round_number, right.view(np.int64)) & mask)
        out[walking] = (left << np.uint64(half)) | right
        walking = out >= np.uint64(size)
    return out.astype(np.int64)
