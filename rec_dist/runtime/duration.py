"""Estimates of the time left in a phase, and durations in human-readable form."""

import statistics
from collections import deque

_RECENT_STEPS = 20  # their median, so that one slow step does not move the estimate


class Remaining:
    """Estimates the seconds left from the steps that this process has seen."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._warm = False

    def step(self, seconds: float) -> None:
        """Record a step. The first one is ignored: only it compiles kernels and fills caches."""
        if self._warm:
            self._recent.append(seconds)
        self._warm = True

    def seconds(self, done: int) -> float | None:
        """Estimate after `done` of all steps. None before the first recorded step and when no step is left."""
        left = self._total - done
        return statistics.median(self._recent) * left if self._recent and left > 0 else None


def duration(seconds: float) -> str:
    """Format with the two largest units: `2 d 3 h`, `4 min 5 s`, `0 s`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{value} {unit}" for value, unit in parts if value][:2]
    return " ".join(shown) or "0 s"
