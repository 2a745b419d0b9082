"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: Schedule) -> float:
    """The rate for 0-based `step`: linear warm-up to `peak`, then constant, or linear or cosine down to 0 after the last step.

    >>> [round(learning_rate(s, peak=1.0, warmup_steps=2, total_steps=6, schedule="linear"), 2) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
