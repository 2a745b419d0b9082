"""What every worker of `rec-dist profile` does: the steps of a training run under a clock, and nothing kept of them.

Set-up, plan, loader, micro-batches, engine and loop are those of training/worker.py. The learning rate is 0, which costs the same and
leaves the weights as they are. First real data: the numbers that count. Then one traced step, then micro-batches of the same lengths with
random tokens, made before the clock starts, and the real ones through the loader again: by then libraries and allocators
know all lengths, for which a first meeting costs, so that what random tokens are faster by than these is what the data costs.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rec_dist.config.schema import ProfileConfig, RunConfig
from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine
from rec_dist.errors import NotFiniteError, UserError
from rec_dist.methods.task import Task
from rec_dist.models.flex import num_compilations
from rec_dist.models.scorer import rows_run
from rec_dist.models.size import count_weights
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist.profiling.phases import Clock, StepTime, TimedEngine
from rec_dist.profiling.report import PROFILE_NAME, RankRecord, merge
from rec_dist.profiling.trace import traced
from rec_dist.runtime import collectives
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.training import loop
from rec_dist.training.loader import StepWork, prefetch, step_work
from rec_dist.training.memory import MemoryWatch, advising, peak_bytes, total_bytes
from rec_dist.training.micro_batches import open_reference, preparer
from rec_dist.training.worker import TrainJob, set_up

Prepare = Callable[[Any], Any]


def profile_worker(world: World, job: TrainJob) -> dict[str, Any]:
    """Measures, and returns the report (profiling/report.py), the same on every rank. job.run_dir: where traces go."""
    process_group.join(world)
    config = job.parsed()
    _check(config.profile, world)
    with advising(config, world) as memory:
        result = _profile(world, config, job, memory)
    process_group.leave()
    return result


def _check(settings: ProfileConfig, world: World) -> None:
    if strange := [rank for rank in settings.trace_ranks if not 0 <= rank < world.size]:
        raise UserError(f"profile.trace_ranks names {strange}, and this run has the ranks 0 to {world.size - 1}; name those")
    if settings.memory_snapshot and not world.device.startswith("cuda"):
        raise UserError("profile.memory_snapshot=true needs a GPU: it is the CUDA allocator's history; set it to false")


@dataclass(frozen=True)
class _Bench:
    """What the measured steps share."""

    engine: Engine
    task: Task
    seed: int
    world: World
    clock: Clock

    def run(self, work: Iterable[StepWork], prepare: Prepare, done: Callable[[], None]) -> list[StepTime]:
        """Runs every step of `work` and returns its times; done: called after each."""

        def timed(batch: Any) -> Any:
            with self.clock.phase("reference"):
                return prepare(batch)

        def learning_rate(step: int) -> float:  # asked for between the reduction and the optimizer
            self.clock.end("reduce")
            return 0.0

        hooks = loop.Hooks(timed, learning_rate, lambda step: False, lambda row: None, lambda step: None)
        verbs, times = TimedEngine(self.engine, self.clock), []
        last = time.perf_counter()
        for plan in work:
            waited = time.perf_counter() - last
            result = loop.run_step(verbs, self.task, plan, hooks, seed=self.seed, world=self.world)
            if result.bad_users is not None:  # no optimizer step was made, so there is none to measure
                raise NotFiniteError(
                    f"step {plan.step + 1} cannot be measured: {result.numbers}; lower task.beta or optimizer.lr"
                )
            phases = {**self.clock.take(), "data": waited}
            now = time.perf_counter()
            times.append(StepTime(now - last, phases, plan.num_tokens, plan.num_logical_tokens, plan.num_groups))
            done()
            last = time.perf_counter()
        return times


def _profile(world: World, config: RunConfig, job: TrainJob, memory: MemoryWatch) -> dict[str, Any]:
    settings, run = config.profile, RunDirectory(Path(job.run_dir))
    task, engine = set_up(config, job.initial, world, run.log)
    memory.start()
    store = open_reference(engine, task, config, run, world, run.reference)
    engine.train_mode(True)
    bench = _Bench(engine, task, config.train.seed, world, Clock(world.device))
    prepare = preparer(engine, task, store, memory)

    def plan(step: int) -> StepWork:
        return step_work(task, step % task.sampler.num_steps, max_tokens=config.train.max_tokens_per_micro_batch, world=world)

    warm, total = settings.warmup_steps, settings.warmup_steps + settings.steps
    counted = range(warm, total)
    done = _progress(run, world, total + 1 + 1 + 2 * settings.steps)

    with _prefetched(plan, range(total)) as work:
        bench.run((next(work) for _ in range(warm)), prepare, done)
        compiled = num_compilations()
        real = bench.run((next(work) for _ in counted), prepare, done)
    peak = peak_bytes(world.device)
    memory.next_micro_batch(0)

    def one_more() -> None:
        bench.run([plan(total - 1)], prepare, done)

    if world.is_main:  # what an earlier profile left stays until now, and never beside the traces of this one
        (run.path / PROFILE_NAME).unlink(missing_ok=True)
    trace = traced(one_more, settings, world, run.path)
    plans = [plan(step) for step in counted]
    random = [_random(step, engine.module, np.random.default_rng(step.step)) for step in plans]
    online = prepare if store is None else lambda batch: batch
    bench.run(random[:1], online, done)
    synthetic = bench.run(random, online, done)
    with _prefetched(plan, counted) as work:
        again = bench.run(work, prepare, done)
    record = RankRecord(
        real=real,
        synthetic=synthetic,
        again=again,
        peak_bytes=peak,
        total_bytes=total_bytes(world.device),
        static_bytes=memory.static_bytes or 0,
        bytes_per_token=memory.bytes_per_token,
        recompilations=num_compilations() - compiled,
        traced=trace,
        **_rows(plans, engine.module),
    )
    ranks, weights = collectives.gather(record), count_weights(engine.module)
    report = merge(ranks, config, weights, dtype=task.dtype, device=world.device, sampler=task.sampler) if world.is_main else None
    return dict(collectives.share_from_main(report))


@contextmanager
def _prefetched(make: Callable[[int], StepWork], steps: range) -> Iterator[Iterator[StepWork]]:
    """The loader as training has it; its thread ends with the block."""
    work: Any = prefetch(make, steps)
    try:
        yield work
    finally:
        work.close()


def _progress(run: RunDirectory, world: World, total: int) -> Callable[[], None]:
    count = 0

    def done() -> None:
        nonlocal count
        count += 1
        if world.is_main:
            run.progress("profile", count, total)

    return done


def _rows(plans: list[StepWork], module: Any) -> dict[str, int]:
    """Of this rank in the counted steps: rows that stand for tokens, rows run with padding and dummy batches, distinct scored rows."""
    batches = [batch for plan in plans for batch in plan.batches]
    return {
        "rows_used": sum(batch.num_tokens for batch in batches if batch.num_groups),
        "rows_run": sum(rows_run(module, batch) for batch in batches),
        "rows_scored": sum(len(torch.unique(batch.rows)) for batch in batches if batch.num_groups),
    }


def _random(plan: StepWork, module: Any, generator: np.random.Generator) -> StepWork:
    """The same micro-batches with random tokens. Those of a recommender on ids stay as they are: its items cost the same, whichever."""

    def drawn(batch: Any) -> Any:
        if not isinstance(batch, PackedBatch):
            return batch
        return batch.with_random_tokens(int(module._base[0].config.vocab_size), generator)

    return replace(plan, batches=tuple(drawn(batch) for batch in plan.batches))
