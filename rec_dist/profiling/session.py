"""What every worker of `rec-dist profile` does: it runs the steps of a training run under a clock and keeps nothing of them.

Set-up, plan, loader, engine and step are those of training/worker.py. The learning rate is 0, which costs the same and
leaves the weights as they are. Real data comes first and gives the numbers that count. Then come one traced step,
micro-batches of the same lengths with random tokens, made before the clock starts, and the real ones through the loader
again. By then libraries and allocators have seen all lengths (the first time costs more), so the difference between
random tokens and these is what the data costs.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rec_dist.config.profile import ProfileConfig
from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine
from rec_dist.errors import NotFiniteError, UserError
from rec_dist.methods.task import Task
from rec_dist.models.flex import num_compilations
from rec_dist.models.scorer import rows_run
from rec_dist.models.size import count_weights
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist.packing.transfer import staged
from rec_dist.profiling.phases import Clock, StepTime, TimedEngine, TimedReference
from rec_dist.profiling.report import PROFILE_NAME, RankRecord, merge
from rec_dist.profiling.trace import traced
from rec_dist.runtime import collectives
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.sizing.device import total_bytes
from rec_dist.training.context import WorkerContext
from rec_dist.training.loader import Change, StepWork, as_it_is, step_work, steps_ahead
from rec_dist.training.loop import TrainStep
from rec_dist.training.memory import advising, peak_bytes
from rec_dist.training.reference import ReferenceLogps, open_reference
from rec_dist.training.utilisation import head_share
from rec_dist.training.worker import TrainJob, passes_of, set_up


def profile_worker(world: World, job: TrainJob) -> dict[str, Any]:
    """Measure; returns the report (profiling/report.py), the same on every rank. Traces go to job.run_dir."""
    config = job.parsed()
    with process_group.joined(world):
        _check(config.profile, world)
        with advising(config, world) as memory:
            return _profile(job, WorkerContext(config, world, RunDirectory(Path(job.run_dir)), memory))


def _check(settings: ProfileConfig, world: World) -> None:
    if strange := [rank for rank in settings.trace_ranks if not 0 <= rank < world.size]:
        raise UserError(f"profile.trace_ranks names {strange}, and this run has the ranks 0 to {world.size - 1}; name those")
    if settings.memory_snapshot and not world.device.startswith("cuda"):
        raise UserError("profile.memory_snapshot=true needs a GPU: it is the CUDA allocator's history; set it to false")


@dataclass(frozen=True)
class _Bench:
    """What the measured steps share. done: called after each."""

    engine: Engine
    task: Task
    context: WorkerContext
    clock: Clock
    done: Callable[[], None]

    def run(self, work: Iterable[StepWork], reference: ReferenceLogps) -> list[StepTime]:
        """Run every step of `work` and return its times."""
        step, times = self._step(reference), []
        last = time.perf_counter()
        for plan in work:
            waited = time.perf_counter() - last
            result = step.update(plan, step.forward_backward(plan), lr=0.0)
            if result.bad_users is not None:  # the optimizer made no step, so there is none to measure
                raise NotFiniteError(
                    f"step {plan.step + 1} cannot be measured: {result.numbers}; lower task.beta or optimizer.lr"
                )
            phases = {**self.clock.take(), "data": waited}
            now = time.perf_counter()
            times.append(StepTime(now - last, phases, plan.num_tokens, plan.num_logical_tokens, plan.num_groups))
            self.done()
            last = time.perf_counter()
        return times

    def _step(self, reference: ReferenceLogps) -> TrainStep:
        """A training step under the clock."""
        module = self.engine.module
        return TrainStep(
            TimedEngine(self.engine, self.clock),
            self.task,
            TimedReference(reference, self.clock),
            self.task.exchange(module),
            self.context.watch(module),
            self.context.world,
        )


def _profile(job: TrainJob, context: WorkerContext) -> dict[str, Any]:
    settings, world, memory, run = context.config.profile, context.world, context.memory, context.run
    task, engine = set_up(job.initial.on_this_node(code=context.config.model.trust_remote_code), context)
    memory.start()
    task.first_pass(passes_of(engine, context))
    reference = open_reference(engine, task, context, run.reference)
    engine.train_mode(True)
    warm, total = settings.warmup_steps, settings.warmup_steps + settings.steps
    counted = range(warm, total)
    bench = _Bench(engine, task, context, Clock(world.device), _progress(context, total + 1 + 1 + 2 * settings.steps))

    def plan(number: int, look_up: Change = reference.look_up) -> StepWork:
        return step_work(task, number, max_tokens=context.max_tokens, world=world, look_up=look_up)

    ahead = _loader(task, reference, context)
    numbers = [step % task.sampler.num_steps for step in range(total)]
    with ahead(numbers) as work:
        bench.run((next(work) for _ in range(warm)), reference)
        compiled = num_compilations()
        real = bench.run((next(work) for _ in counted), reference)
    peak = peak_bytes(world.device)
    memory.next_micro_batch(0)
    bytes_per_token = memory.bytes_per_token

    if world.is_main:  # an earlier profile stays until now, and never lies beside the traces of this one
        (run.path / PROFILE_NAME).unlink(missing_ok=True)
    trace = traced(lambda: bench.run([plan(numbers[-1])], reference), settings, world, run.path)
    # A cache knows nothing of random tokens; without it these batches keep the zeros they were packed with.
    plans = [plan(number, look_up=as_it_is) for number in numbers[warm:]]
    random = [_random(step, engine.module, np.random.default_rng(step.step), world) for step in plans]
    bench.run(random[:1], reference)
    synthetic = bench.run(random, reference)
    with ahead(numbers[warm:]) as work:
        again = bench.run(work, reference)
    record = RankRecord(
        real=real,
        synthetic=synthetic,
        again=again,
        peak_bytes=peak,
        total_bytes=total_bytes(world.device),
        static_bytes=memory.static_bytes or 0,
        bytes_per_token=bytes_per_token,
        recompilations=num_compilations() - compiled,
        traced=trace,
        **_rows(plans, engine.module),
    )
    ranks, weights = collectives.gather(record), count_weights(engine.module)
    report = None
    if world.is_main:
        report = merge(
            ranks,
            context.config,
            weights,
            dtype=task.model.dtype,
            device=world.device,
            sampler=task.sampler,
            zero_stage=engine.zero_stage,
        )
    return dict(collectives.share_from_main(report))


def _loader(task: Task, reference: ReferenceLogps, context: WorkerContext) -> Callable[[Sequence[int]], Any]:
    """steps_ahead as training has it."""
    return partial(
        steps_ahead,
        task,
        max_tokens=context.max_tokens,
        world=context.world,
        look_up=reference.look_up,
        num_workers=context.config.train.dataloader_num_workers,
    )


def _progress(context: WorkerContext, total: int) -> Callable[[], None]:
    count = 0

    def done() -> None:
        nonlocal count
        count += 1
        context.progress("profile", count, total)

    return done


def _rows(plans: list[StepWork], module: Any) -> dict[str, int]:
    """Of this rank in the counted steps: rows of tokens, rows run (with padding and dummy batches), distinct scored rows."""
    batches = [batch for plan in plans for batch in plan.batches]
    return {
        "rows_used": sum(batch.num_tokens for batch in batches if batch.num_groups),
        "rows_run": sum(rows_run(module, batch) for batch in batches),
        "rows_scored": sum(_rows_scored(batch, module) for batch in batches if batch.num_groups),
    }


def _rows_scored(batch: Any, module: Any) -> int:
    """Distinct scored rows, each counted by its share of the vocabulary where it competes with what titles go on with."""
    rows = len(torch.unique(batch.rows))
    return rows if getattr(batch, "allowed", None) is None else round(rows * head_share([batch], module.vocab_size))


def _random(plan: StepWork, module: Any, generator: np.random.Generator, world: World) -> StepWork:
    """The same micro-batches with random tokens. A recommender's stay as they are, since every item id costs the same."""

    def drawn(batch: Any) -> Any:
        if not isinstance(batch, PackedBatch):
            return batch
        return staged(batch.with_random_tokens(module.vocab_size, generator), world.device)

    return replace(plan, batches=tuple(drawn(batch) for batch in plan.batches))
