"""Columns of metrics.jsonl as curves: smoothed, and thinned to 400 points. S steps."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_MAX_POINTS = 400
FloatArray = npt.NDArray[np.float64]


def has(steps: Mapping[str, FloatArray], column: str) -> bool:
    """Whether a column is there and has a number."""
    return column in steps and bool(np.isfinite(steps[column]).any())


def smooth(values: FloatArray) -> FloatArray:
    """(S,) -> (S,): the centred mean over about a twentieth of the run, over less at both ends; gaps are skipped."""
    half = max(1, len(values) // 40)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre = np.arange(len(values))
    first, last = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    number = counts[last] - counts[first]
    total = sums[last] - sums[first]
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def thin(steps: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most about 400 points, which keep the lowest and highest value of each stretch, so that no spike is lost."""
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    if len(values) <= _MAX_POINTS:
        return steps, values
    index: set[int] = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), _MAX_POINTS // 2):
        index |= {int(stretch[np.argmin(values[stretch])]), int(stretch[np.argmax(values[stretch])])}
    kept = sorted(index)
    return steps[kept], values[kept]
