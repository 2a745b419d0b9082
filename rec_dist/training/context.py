"""What the parts of one worker share: its configuration, its place among the ranks, and where it reports to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from rec_dist.config.schema import RunConfig
from rec_dist.models.scorer import rows_run
from rec_dist.runtime.heartbeat import pause_wanted
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.training.memory import MemoryWatch


class Beat(Protocol):
    """As runtime.heartbeat.Heartbeat.beat: called whenever this worker makes progress."""

    def __call__(self, phase: str | None = None, step: int | None = None) -> None: ...


def no_beat(phase: str | None = None, step: int | None = None) -> None:
    """Do nothing: for workers that no watchdog watches."""


@dataclass(frozen=True)
class WorkerContext:
    """log, record and progress write on rank 0 alone, so every rank may call them."""

    config: RunConfig
    world: World
    run: RunDirectory
    memory: MemoryWatch
    beat: Beat = no_beat

    @property
    def max_tokens(self) -> int:
        """train.max_tokens_per_micro_batch."""
        return self.config.train.max_tokens_per_micro_batch

    def log(self, line: str) -> None:
        """Add a line to the run's log.txt."""
        if self.world.is_main:
            self.run.log(line)

    def record(self, row: dict[str, Any]) -> None:
        """Add a row to metrics.jsonl."""
        if self.world.is_main:
            self.run.append(row)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Say that `done` of `total` of a phase are done; also a sign of life."""
        self.beat()
        if self.world.is_main:
            self.run.progress(phase, done, total)

    def stop_wanted(self, step: int) -> bool:
        """Whether the run should save and stop after `step` steps. Only rank 0 looks, and the loop tells the others."""
        return self.world.is_main and (self.run.stop_wanted(step) or pause_wanted(self.run.attempt, step))

    def watch(self, module: nn.Module) -> Callable[[Any], None]:
        """Return what to call before each micro-batch of `module`: a sign of life, and the measurement of its memory."""

        def before(batch: Any) -> None:
            self.beat()
            self.memory.next_micro_batch(rows_run(module, batch))

        return before
