"""A run's numbers as gauges of Ray, which every Ray node serves to Prometheus (`ray start --metrics-export-port`).

Ray puts `ray_` before each name, and removes a gauge some seconds after its worker is gone. launchers/grafana.json draws them.
Cost: microseconds a step; Ray collects them every 10 s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
_PREFIX = "rec_dist_"


@dataclass(frozen=True)
class Measure:
    """A gauge. value: takes a row as trackers get it, and gives None for a task without this number."""

    name: str
    meaning: str
    value: Callable[[Row], float | None]


MEASURES = (
    Measure("step", "Optimizer steps done", lambda row: row["step"]),
    Measure("loss", "Loss of the last step, the mean over its global batch", lambda row: row["loss"]),
    Measure("reward_margin", "Reward of the chosen item above the rejected ones", lambda row: row.get("rewards/margins")),
    Measure("gradient_norm", "Norm of the gradient before clipping", lambda row: row["grad_norm"]),
    Measure("tokens_per_second", "Tokens a second, over all workers", lambda row: row["tokens_per_second"]),
    Measure("groups_per_second", "Groups a second, over all workers", lambda row: row["groups"] / row["step_seconds"]),
    Measure("mfu", "Share of the devices' floating-point peak that the model's operations take", lambda row: row["mfu"]),
    Measure("step_seconds", "Seconds of the last step", lambda row: row["step_seconds"]),
    Measure("data_wait_seconds", "Seconds of the last step in which it waited for data", lambda row: row["data_seconds"]),
    Measure("restarts", "How often training started again", lambda row: row["restarts"]),
    Measure("workers", "Workers of this attempt", lambda row: row["workers"]),
)
EXPORTED = tuple(f"ray_{_PREFIX}{measure.name}" for measure in MEASURES)


def label(name: str) -> str:
    """A run's name as Ray takes it for a label or a name of its own: ASCII, so that ü is written \\xfc."""
    return name.encode("ascii", "backslashreplace").decode()


class RayGauges:
    """A tracker for the worker that writes metrics.jsonl; run: the value of the label `run`."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": label(run)}
        self._gauges: list[Any] = [
            Gauge(f"{_PREFIX}{measure.name}", description=measure.meaning, tag_keys=("run",)) for measure in MEASURES
        ]

    def log(self, row: Row) -> None:
        """Sets every gauge for which the row has a number."""
        for measure, gauge in zip(MEASURES, self._gauges, strict=True):
            value = measure.value(row)
            if value is not None:
                gauge.set(float(value), tags=self._tags)

    def close(self) -> None:
        """Does nothing: Ray removes the gauges by itself."""
