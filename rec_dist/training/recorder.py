"""What a run says of each step: a row of metrics.jsonl, the same row for trackers, and the progress that the driver shows."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from rec_dist.engine.engine import Engine
from rec_dist.methods.task import Task
from rec_dist.runtime.duration import Remaining
from rec_dist.runtime.rows import num_restarts
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.training.bad_steps import describe
from rec_dist.training.context import WorkerContext
from rec_dist.training.loader import StepWork
from rec_dist.training.trackers import Tracker
from rec_dist.training.utilisation import Utilisation, utilisation_of


class Recorder(Protocol):
    """Takes what each step came to."""

    def step(self, plan: StepWork, numbers: dict[str, float], *, seconds: float, waited: float) -> None:
        """Take a step that was applied; waited: of its `seconds`, those spent waiting for its data."""
        ...

    def bad_step(self, row: dict[str, Any]) -> None:
        """Take the row of a step that was left out."""
        ...


class SilentRecorder:
    """For ranks that write nothing."""

    def step(self, plan: StepWork, numbers: dict[str, float], *, seconds: float, waited: float) -> None:
        """Do nothing."""

    def bad_step(self, row: dict[str, Any]) -> None:
        """Do nothing."""


@dataclass
class StepRecorder:
    """Rank 0's. total: steps of the run; every_steps: how often a row is written; facts: added to the rows for trackers."""

    run: RunDirectory
    tracker: Tracker
    total: int
    every_steps: int
    utilisation: Utilisation
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._remaining = Remaining(self.total)

    def step(self, plan: StepWork, numbers: dict[str, float], *, seconds: float, waited: float) -> None:
        """As Recorder.step."""
        mfu = self.utilisation(plan.num_tokens, plan.num_scored, seconds, plan.batches)
        self.record(step_row(plan, numbers, seconds=seconds, waited=waited, mfu=mfu))

    def record(self, row: dict[str, Any]) -> None:
        """Take the row of a step that was applied."""
        note = f"loss {row['loss']:.4f}, {row['tokens_per_second']:.0f} tokens/s"
        self._remaining.step(row["step_seconds"])
        self.run.progress("train", row["step"], self.total, note, self._remaining.seconds(row["step"]))
        if row["step"] % self.every_steps == 0 or row["step"] == self.total:
            self.run.append(row)
            self.tracker.log({**row, **self.facts})

    def bad_step(self, row: dict[str, Any]) -> None:
        """As Recorder.bad_step."""
        self.run.progress("train", row["step"], self.total, "left out", self._remaining.seconds(row["step"]))
        self.run.append(row)
        self.run.log(f"WARNING: {describe(row)}")


def open_recorder(engine: Engine, task: Task, tracker: Tracker, context: WorkerContext) -> Recorder:
    """The recorder of this rank."""
    if not context.world.is_main:
        return SilentRecorder()
    return StepRecorder(
        context.run,
        tracker,
        task.sampler.num_steps,
        context.config.train.log_every_steps,
        utilisation_of(engine.module, task.model.dtype, context.world),
        {"restarts": num_restarts(context.run.rows()), "workers": context.world.size},  # the same for all steps of an attempt
    )


def step_row(plan: StepWork, numbers: dict[str, float], *, seconds: float, waited: float, mfu: float | None) -> dict[str, Any]:
    """The row of metrics.jsonl for one step. numbers: loss, grad_norm, lr, metrics. mfu: None when it is not counted."""
    return {
        "event": "step",
        "step": plan.step + 1,
        "epoch": plan.epoch,
        **numbers,
        "tokens": plan.num_tokens,
        "logical_tokens": plan.num_logical_tokens,
        "groups": plan.num_groups,
        "tokens_per_second": plan.num_tokens / seconds,
        "step_seconds": seconds,
        "data_seconds": waited,
        "mfu": mfu,
    }
