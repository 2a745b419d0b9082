"""How long the rest of a phase will take, and such times as a person reads them."""

import statistics
from collections import deque

_RECENT_STEPS = 20  # the rest goes by their median, so that one slow step does not move it


class Remaining:
    """Seconds left of a number of like steps, by those that this process has seen."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._warm = False

    def step(self, seconds: float) -> None:
        """A step took so long. The first one is left out: it compiles kernels and fills caches, which none after it does."""
        if self._warm:
            self._recent.append(seconds)
        self._warm = True

    def seconds(self, done: int) -> float | None:
        """After `done` of all steps; None before there is a step to go by, and when none is left."""
        left = self._total - done
        return statistics.median(self._recent) * left if self._recent and left > 0 else None


def duration(seconds: float) -> str:
    """The two largest examples: `2 d 3 h`, `4 min 5 s`, `0 s`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{value} {example}" for value, example in parts if value][:2]
    return " ".join(shown) or "0 s"
