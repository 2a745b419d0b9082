"""The loop: it knows steps, sums and the engine; no method, no Ray, no DeepSpeed.

A loss arrives as a sum; it is divided once, by the count of the whole global step, so that world size, packing and
accumulation do not change it.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rec_dist.methods.task import Task
from rec_dist.runtime import collectives
from rec_dist.runtime.world import World
from rec_dist.training.bad_steps import BadSteps, is_bad, suspects
from rec_dist.training.loader import StepWork
from rec_dist.training.utilisation import Utilisation


class EngineProtocol(Protocol):
    """What the loop asks of an engine; engine/engine.py, or profiling/phases.py with a clock around it."""

    def forward(self, batch: Any) -> Any: ...
    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...
    def step(self, lr: float, *, discard: bool = False) -> float: ...


@dataclass(frozen=True)
class Hooks:
    """What the loop calls out to. prepare: a batch just before its forward pass (adds the reference). All ranks call all of them.

    writing: whether this rank still writes a checkpoint; settle: what is to be done once none does.
    mfu: the utilisation of a step of so many tokens and scored tokens in so many seconds.
    """

    prepare: Callable[[Any], Any]
    learning_rate: Callable[[int], float]
    stop_wanted: Callable[[int], bool]  # asked on rank 0 only
    log: Callable[[dict[str, Any]], None]
    checkpoint: Callable[[int], None]
    writing: Callable[[], bool] = lambda: False
    settle: Callable[[], None] = lambda: None
    mfu: Utilisation = lambda tokens, scored, seconds: None


@dataclass(frozen=True)
class StepResult:
    """What a step came to, over all ranks. bad_users: None when it was applied, else whose groups it may have been."""

    numbers: dict[str, float]  # loss, grad_norm, lr and the task's metrics
    stop: bool
    writing: bool
    bad_users: list[str] | None


def train(
    engine: EngineProtocol,
    task: Task,
    work: Iterable[StepWork],
    hooks: Hooks,
    *,
    every_steps: int,
    seed: int,
    world: World,
    bad_steps: BadSteps,
) -> bool:
    """Runs the steps of `work`. Returns True when it came to the end, False when asked to stop.

    NotFiniteError: too many bad steps in a row.
    """
    total = task.sampler.num_steps
    last = time.perf_counter()
    for plan in work:
        waited = time.perf_counter() - last
        result = run_step(engine, task, plan, hooks, seed=seed, world=world)
        done = plan.step + 1
        now = time.perf_counter()
        if result.bad_users is None:
            bad_steps.good()
            seconds = now - last
            mfu = hooks.mfu(plan.num_tokens, plan.num_scored, seconds)
            hooks.log(step_row(task, plan, result.numbers, seconds=seconds, waited=waited, mfu=mfu))
        else:
            row = bad_steps.row(plan, result.numbers, result.bad_users)
            hooks.log(row)
            bad_steps.check(row)
        last = now
        if not result.writing:
            hooks.settle()
        stop = result.stop and done < total
        if stop or done == total or done % every_steps == 0:
            hooks.checkpoint(done)
        if stop:
            return False
    return True


def run_step(engine: EngineProtocol, task: Task, plan: StepWork, hooks: Hooks, *, seed: int, world: World) -> StepResult:
    """One global step: forward and backward over this rank's batches, one optimizer step, one reduction of the sums.

    A loss or gradient that is not finite leaves the weights as they were, on every rank.
    """
    count = plan.num_scored if task.counts_tokens else plan.num_groups
    scale = world.size / count  # DeepSpeed takes the mean over ranks
    torch.manual_seed(
        (seed * 1_000_003 + plan.step) * 4099 + world.rank
    )  # dropout, where there is any, as a function of the step
    spoiled: list[int] = []
    totals = torch.zeros(4 + len(task.metric_names), dtype=torch.float64)
    for number, batch in enumerate(plan.batches):
        loss_sum, sums, _ = engine.forward(hooks.prepare(batch))
        engine.backward(loss_sum * scale, last=number == len(plan.batches) - 1)
        sums = sums.cpu()
        totals[:-2] += sums
        if not math.isfinite(float(sums[0])):
            spoiled.append(number)
    totals[-2] = float(hooks.writing())
    totals[-1] = float(world.is_main and hooks.stop_wanted(plan.step + 1))
    size = len(totals)
    summed = collectives.sum_over_ranks(torch.cat([totals, task.step_sums()]))
    totals = summed[:size]
    task.end_step(summed[size:])
    loss = float(totals[0]) / count
    lr = hooks.learning_rate(plan.step)
    grad_norm = engine.step(lr, discard=not math.isfinite(loss))
    means = {name: float(totals[2 + i]) / max(float(totals[1]), 1.0) for i, name in enumerate(task.metric_names)}
    numbers = {"loss": loss, "grad_norm": grad_norm, "lr": lr, **means}
    bad_users = suspects(task, plan, spoiled) if is_bad(numbers) else None
    return StepResult(numbers, stop=float(totals[-1]) > 0, writing=float(totals[-2]) > 0, bad_users=bad_users)


def step_row(
    task: Task, plan: StepWork, numbers: dict[str, float], *, seconds: float, waited: float, mfu: float | None
) -> dict[str, Any]:
    """The row of metrics.jsonl for one step. mfu: None where operations are not counted, and on ranks that do not write it."""
    return {
        "event": "step",
        "step": plan.step + 1,
        "epoch": plan.epoch,
        "loss": numbers["loss"],
        "grad_norm": numbers["grad_norm"],
        "lr": numbers["lr"],
        **{name: numbers[name] for name in task.metric_names},
        "tokens": plan.num_tokens,
        "logical_tokens": plan.num_logical_tokens,
        "groups": plan.num_groups,
        "tokens_per_second": plan.num_tokens / seconds,
        "step_seconds": seconds,
        "data_seconds": waited,
        "mfu": mfu,
    }
