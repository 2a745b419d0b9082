"""Where the time of a step goes: a clock around the engine's calls, and the sums over steps and ranks.

On a GPU the clock is CUDA events in the stream of the work, so measuring does not make the host wait inside a step. A
collective that a call waits for counts as time of that call. Only a trace can tell how much of a step is collectives.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rec_dist.training.loop import EngineProtocol
from rec_dist.training.reference import ReferenceLogps

PHASES = ("data", "reference", "forward", "backward", "reduce", "optimizer")


class Clock:
    """Seconds by phase of the step that runs. A phase may be entered many times a step."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._marks: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def begin(self, phase: str) -> None:
        """Enter a phase; entering it again before its end moves its begin."""
        self._open[phase] = self._now()

    def end(self, phase: str) -> None:
        """Leave a phase."""
        self._marks.append((phase, self._open.pop(phase), self._now()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, the phase runs."""
        self.begin(name)
        yield
        self.end(name)

    def take(self) -> dict[str, float]:
        """Return seconds by phase since the last call, once the device is done. The caller adds "data", time of the host."""
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
    """Implements train.loop.EngineProtocol: each call of `engine` under the clock.

    The phase "reduce" lasts from the last backward pass to the optimizer's step.
    """

    def __init__(self, engine: EngineProtocol, clock: Clock) -> None:
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
        self._clock.end("reduce")
        with self._clock.phase("optimizer"):
            return self._engine.step(lr, discard=discard)


@dataclass(frozen=True)
class TimedReference:
    """Implements train.reference.ReferenceLogps: `reference` under the clock."""

    reference: ReferenceLogps
    clock: Clock

    def look_up(self, batch: Any) -> Any:
        """As the reference's own; not timed, since it runs in the loader's thread."""
        return self.reference.look_up(batch)

    def attach(self, batch: Any) -> Any:
        """As the reference's own."""
        with self.clock.phase("reference"):
            return self.reference.attach(batch)


@dataclass(frozen=True)
class StepTime:
    """One step on one rank: its wall-clock seconds, the seconds of each phase, and the counts of the plan over all ranks."""

    seconds: float
    phases: dict[str, float]
    tokens: int
    logical_tokens: int
    groups: int

    @property
    def own_seconds(self) -> float:
        """Seconds until this rank reached the reduction, where all ranks wait. Under ZeRO-3 they include waits in gathers."""
        return sum(self.phases[phase] for phase in ("data", "reference", "forward", "backward"))


def shares(steps: Sequence[StepTime]) -> dict[str, float]:
    """phase -> its share of the seconds of all `steps`, of all ranks; "other" is the rest. The shares add up to 1."""
    total = sum(step.seconds for step in steps)
    found = {phase: sum(step.phases[phase] for step in steps) / total for phase in PHASES}
    rest = 1.0 - sum(found.values())
    if rest < 0:  # clocks of host and device differ by microseconds
        return {**{phase: share / (1.0 - rest) for phase, share in found.items()}, "other": 0.0}
    return {**found, "other": rest}


def speed(ranks: Sequence[Sequence[StepTime]]) -> dict[str, Any]:
    """Step times and rates of ranks[r][step]. A step takes as long as on its slowest rank; a rate is a total over a total."""
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
    """The q-th percentile (0..100), interpolated linearly.

    >>> percentile([4.0, 1.0, 2.0, 3.0], 50)
    2.5
    """
    return float(np.percentile(np.asarray(values, dtype=np.float64), q))


def lag(ranks: Sequence[Sequence[StepTime]]) -> dict[str, Any]:
    """The rank that reaches the reduction last, by its median over steps, and how far it is behind the first."""
    own = [percentile([step.own_seconds for step in rank], 50) for rank in ranks]
    step = percentile([step.seconds for step in ranks[0]], 50)
    slowest = int(np.argmax(own))
    behind = own[slowest] - min(own)
    return {"slowest_rank": slowest, "lag_seconds": behind, "lag_share": behind / step, "own_seconds": own}
