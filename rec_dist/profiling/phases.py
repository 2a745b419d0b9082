"""Where the time of a step goes: a clock around the engine's verbs, and the sums over steps and ranks.

On a GPU the clock is CUDA events on the batch the work is in, so that measuring does not make the host wait inside a step; a
collective that a verb waits for counts as that verb's time. How much of a step is collectives, only a trace can tell.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rec_dist.engine.engine import Engine

PHASES = ("data", "reference", "forward", "backward", "reduce", "optimizer")


class Clock:
    """Seconds by phase of the step that runs. A phase may be entered many times a step."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._marks: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def begin(self, phase: str) -> None:
        """Enters a phase; entering it again before its end moves its begin."""
        self._open[phase] = self._now()

    def end(self, phase: str) -> None:
        """Leaves it."""
        self._marks.append((phase, self._open.pop(phase), self._now()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """begin and end."""
        self.begin(name)
        yield
        self.end(name)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; waits for the device. "data" is the host's to add: nothing runs on the device then."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in self._marks:
            seconds[phase] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        self._marks.clear()
        return seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class TimedEngine:
    """The engine's verbs as the loop calls them, each under the clock. After the last backward pass "reduce" begins."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine, self._clock = engine, clock

    def forward(self, batch: Any) -> Any:
        """As Engine.forward."""
        with self._clock.phase("forward"):
            return self._engine.forward(batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """As Engine.backward."""
        with self._clock.phase("backward"):
            self._engine.backward(loss, last=last)
        if last:
            self._clock.begin("reduce")

    def step(self, lr: float, *, discard: bool = False) -> float:
        """As Engine.step."""
        with self._clock.phase("optimizer"):
            return self._engine.step(lr, discard=discard)


@dataclass(frozen=True)
class StepTime:
    """One step on one rank: its wall-clock seconds, those by phase, and the counts of the plan over all ranks."""

    seconds: float
    phases: dict[str, float]
    tokens: int
    logical_tokens: int
    groups: int

    @property
    def own_seconds(self) -> float:
        """Until this rank came to the reduction that all wait in. Under ZeRO-3 the gathers before it are waits as well."""
        return sum(self.phases[phase] for phase in ("data", "reference", "forward", "backward"))


def shares(steps: Sequence[StepTime]) -> dict[str, float]:
    """phase -> share of the seconds of all `steps`, of all ranks; "other" is the rest. They add up to 1."""
    total = sum(step.seconds for step in steps)
    found = {phase: sum(step.phases[phase] for step in steps) / total for phase in PHASES}
    rest = 1.0 - sum(found.values())
    if rest < 0:  # clocks of host and device differ by microseconds
        return {**{phase: share / (1.0 - rest) for phase, share in found.items()}, "other": 0.0}
    return {**found, "other": rest}


def speed(ranks: Sequence[Sequence[StepTime]]) -> dict[str, Any]:
    """Step times and rates of ranks[r][step]; a step lasts as long as on its slowest rank. Rates are totals over totals."""
    seconds = [max(step.seconds for step in same) for same in zip(*ranks, strict=True)]
    waits = [step.phases["data"] for rank in ranks for step in rank]
    counts = {name: sum(getattr(step, name) for step in ranks[0]) for name in ("tokens", "logical_tokens", "groups")}
    return {
        "steps": len(seconds),
        "step_seconds": {"p50": percentile(seconds, 50), "p95": percentile(seconds, 95), "mean": float(np.mean(seconds))},
        "data_wait_seconds": {"p50": percentile(waits, 50), "p95": percentile(waits, 95)},
        "shares": shares([step for rank in ranks for step in rank]),
        **counts,
        **{f"{name}_per_second": count / sum(seconds) for name, count in counts.items()},
    }


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), between neighbours by their distance.

    >>> percentile([4.0, 1.0, 2.0, 3.0], 50)
    2.5
    """
    return float(np.percentile(np.asarray(values, dtype=np.float64), q))


def lag(ranks: Sequence[Sequence[StepTime]]) -> dict[str, Any]:
    """The rank that comes last to the reduction, by the median over steps, and how far behind the first."""
    own = [percentile([step.own_seconds for step in rank], 50) for rank in ranks]
    step = percentile([step.seconds for step in ranks[0]], 50)
    slowest = int(np.argmax(own))
    behind = own[slowest] - min(own)
    return {"slowest_rank": slowest, "lag_seconds": behind, "lag_share": behind / step, "own_seconds": own}
