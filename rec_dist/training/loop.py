"""The training loop: steps, sums, and what happens between steps. It knows no method and no launcher.

A loss arrives as a sum. It is divided once, by the count of the whole global step, so world size, packing and
accumulation do not change it. On a GPU the host runs ahead of the device, and waits for it once a step, in
TrainStep.update.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rec_dist.methods.task import Exchange, Task
from rec_dist.packing.transfer import to_device
from rec_dist.runtime import collectives
from rec_dist.runtime.world import World
from rec_dist.training.bad_steps import BadSteps, is_bad, suspects
from rec_dist.training.loader import StepWork
from rec_dist.training.recorder import Recorder
from rec_dist.training.reference import ReferenceLogps
from rec_dist.training.saving import Saver


class EngineProtocol(Protocol):
    """What a step asks of an engine: engine/engine.py, or profiling/phases.py with a clock around it."""

    def forward(self, batch: Any) -> Any: ...
    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...
    def step(self, lr: float, *, discard: bool = False) -> float: ...


@dataclass(frozen=True)
class StepResult:
    """What a step came to over all ranks. numbers: loss, grad_norm, lr and the task's metrics.

    flags: of those given to update(), which are set on any rank. bad_users: None when the step was applied, else whose
    groups may have spoiled it.
    """

    numbers: dict[str, float]
    flags: tuple[bool, ...]
    bad_users: list[int] | None


@dataclass(frozen=True)
class TrainStep:
    """One global step: forward_backward over this rank's micro-batches, then update. All ranks call both.

    before_batch: called before each micro-batch.
    """

    engine: EngineProtocol
    task: Task
    reference: ReferenceLogps
    exchange: Exchange
    before_batch: Callable[[Any], None]
    world: World

    def count(self, plan: StepWork) -> int:
        """What the step's mean loss is divided by."""
        return plan.count(self.task.model.mean_over)

    def forward_backward(self, plan: StepWork) -> torch.Tensor:
        """Add up the gradients of this rank's B micro-batches.

        Returns the loss, the count and the S metrics of each: (B, 2 + S) float64 on the device.
        """
        scale = self.world.size / self.count(plan)  # DeepSpeed takes the mean over ranks
        torch.manual_seed(_dropout_seed(self.task.sampler.seed, plan.step, self.world.rank))
        sums: list[torch.Tensor] = []
        for number, batch in enumerate(plan.batches):
            self.before_batch(batch)
            loss_sum, own, _ = self.engine.forward(self.reference.attach(batch))
            self.engine.backward(loss_sum * scale, last=number == len(plan.batches) - 1)
            sums.append(own)
        return torch.stack(sums)

    def update(self, plan: StepWork, sums: torch.Tensor, *, lr: float, flags: Sequence[bool] = ()) -> StepResult:
        """Reduce what forward_backward returned over ranks, once, and make one optimizer step.

        When the loss or the gradient is not finite, the weights stay as they are on every rank.
        """
        own = to_device((sums.sum(dim=0), torch.tensor(flags, dtype=torch.float64), self.exchange.step_sums()), sums.device)
        totals, raised, exchanged = torch.split(collectives.sum_over_ranks(torch.cat(own)), [len(part) for part in own])
        self.exchange.end_step(exchanged)
        read = [totals, raised, sums[:, 0]]
        totals, raised, losses = torch.split(torch.cat(read).cpu(), [len(part) for part in read])  # the host waits here
        loss = float(totals[0]) / self.count(plan)
        grad_norm = self.engine.step(lr, discard=not math.isfinite(loss))
        names, counted = self.task.model.metric_names, max(float(totals[1]), 1.0)
        means = {name: float(totals[2 + i]) / counted for i, name in enumerate(names)}
        numbers = {"loss": loss, "grad_norm": grad_norm, "lr": lr, **means}
        spoiled = (~losses.isfinite()).nonzero().flatten().tolist()  # micro-batches of this rank
        bad_users = suspects(self.task, plan, spoiled) if is_bad(numbers) else None
        return StepResult(numbers, tuple(float(flag) > 0 for flag in raised), bad_users)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout is a function of the step, so a resumed run draws what an uninterrupted one would."""
    return (seed * 1_000_003 + step) * 4099 + rank


@dataclass(frozen=True)
class Trainer:
    """Runs steps, writes each down, saves when a checkpoint is due, and stops when asked to.

    learning_rate: of a 0-based step. stop_wanted: whether to stop after so many steps. after_step: what the task does then.
    """

    step: TrainStep
    learning_rate: Callable[[int], float]
    recorder: Recorder
    saver: Saver
    stop_wanted: Callable[[int], bool]
    bad_steps: BadSteps
    after_step: Callable[[int], None]

    def run(self, work: Iterable[StepWork]) -> bool:
        """Run the steps of `work`. Returns True at the end of training, False after a stop.

        Raises NotFiniteError on every rank after too many bad steps in a row.
        """
        total = self.step.task.sampler.num_steps
        last = time.perf_counter()
        for plan in work:
            waited = time.perf_counter() - last
            done = plan.step + 1
            sums = self.step.forward_backward(plan)
            flags = (self.saver.writing, self.stop_wanted(done))
            result = self.step.update(plan, sums, lr=self.learning_rate(plan.step), flags=flags)
            self.after_step(done)
            now = time.perf_counter()
            if result.bad_users is None:
                self.bad_steps.good()
                self.recorder.step(plan, result.numbers, seconds=now - last, waited=waited)
            else:
                row = self.bad_steps.row(plan, result.numbers, result.bad_users)
                self.recorder.bad_step(row)
                self.bad_steps.check(row)
            last = now
            writing, stop = result.flags
            if not writing:  # on no rank, so that committing the checkpoint waits for nobody
                self.saver.settle()
            stop = stop and done < total
            if stop or self.saver.due(done):
                self.saver.save(done)
            if stop:
                return False
        return True
