"""What every worker of a training run does, from joining its group to the saved model. It does not know the launcher.

Read it top to bottom: train_worker, _train, set_up. The loop itself is training/loop.py.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rec_dist.checkpoint.manager import CheckpointManager
from rec_dist.config.schema import RunConfig
from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine, sharded_loading
from rec_dist.errors import NotFiniteError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task
from rec_dist.methods.task import Passes, Task
from rec_dist.runtime import collectives
from rec_dist.runtime.heartbeat import Heartbeat
from rec_dist.runtime.identity import flat
from rec_dist.runtime.rows import num_bad_steps
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.training.bad_steps import BadSteps
from rec_dist.training.context import WorkerContext
from rec_dist.training.loader import steps_ahead, with_beats
from rec_dist.training.loop import Trainer, TrainStep
from rec_dist.training.memory import advising, peak_bytes
from rec_dist.training.recorder import open_recorder
from rec_dist.training.reference import ReferenceLogps, open_reference
from rec_dist.training.saving import Saver, check_host_memory, load_best, open_checkpoints, save_model
from rec_dist.training.schedule import learning_rate
from rec_dist.training.trackers import Tracker, Trackers, build_tracker
from rec_dist.training.validation import open_validation
from rec_dist.training.zero_stage import settled_for_training


@dataclass(frozen=True)
class TrainJob:
    """What the driver sends to each worker: the configuration as plain values and absolute paths.

    gauges: makes the launcher's own tracker for a run of this name, on rank 0; None when it has none.
    """

    config: dict[str, Any]
    run_dir: str
    initial: InitialWeights
    gauges: Callable[[str], Tracker] | None = None

    def parsed(self) -> RunConfig:
        """The configuration, validated again."""
        return RunConfig.model_validate(self.config)


def train_worker(world: World, job: TrainJob) -> dict[str, Any]:
    """Train to the end or to a stop. Returns {"finished": bool, "step": int, ...}, the same on every rank."""
    config, run = job.parsed(), RunDirectory(Path(job.run_dir))
    with Heartbeat(run.attempt, world.rank, world.node) as heart:
        heart.beat("start")
        with process_group.joined(world), advising(config, world) as memory:
            return _train(job, WorkerContext(config, world, run, memory, heart.beat))


def _train(job: TrainJob, context: WorkerContext) -> dict[str, Any]:
    started = time.perf_counter()
    context.beat("load")
    job = replace(job, initial=job.initial.on_this_node(code=context.config.model.trust_remote_code))
    task, engine = set_up(job.initial, context)
    context.memory.start()
    context.beat("reference")  # before anything is restored, so with the weights that the run starts from
    task.first_pass(passes_of(engine, context))
    reference = open_reference(engine, task, context, context.run.reference)
    validation = open_validation(engine, job.initial, context)
    if context.config.checkpoint.asynchronous:
        check_host_memory(engine, context.world)
    checkpoints = open_checkpoints(task, job.initial, context, zero_stage=engine.zero_stage)
    start_step = _restore(engine, checkpoints, context)
    saver = Saver(engine, task, checkpoints, validation, context)
    finished = _run_steps(engine, task, reference, saver, start_step, job, context)
    step = model_step = task.sampler.num_steps if finished else max(checkpoints.committed(), default=0)
    if finished:
        context.beat("model")
        if context.config.checkpoint.use_best:
            model_step = load_best(engine, checkpoints, context, last=step)
        save_model(engine, task, context)
    local, all_bytes = engine.local_parameter_bytes()
    peaks = collectives.gather((context.memory.loading_bytes, peak_bytes(context.world.device)))
    return {
        "finished": finished,
        "step": step,
        "model_step": model_step,
        "zero_stage": engine.zero_stage,
        "seconds": time.perf_counter() - started,
        "parameter_bytes_rank0": local,
        "parameter_bytes_whole": all_bytes,
        "peak_memory_bytes": [training for _, training in peaks],  # by rank
        "peak_loading_bytes": [loading for loading, _ in peaks],
    }


def set_up(initial: InitialWeights, context: WorkerContext) -> tuple[Task, Engine]:
    """Build the task, and an engine in evaluation mode around its module, and check that module."""
    config, world = context.config, context.world
    task = build_task(config, initial, world.device)
    context.beat()
    settings = settled_for_training(task, context)
    context.memory.zero_stage = settings.zero_stage
    with sharded_loading(settings):
        module = task.model.build()
    context.beat()
    engine = Engine(module, settings, device=world.device, optimizer=_optimizer(module, config))
    if world.is_main:
        trainable, whole = (sum(map(_size, part)) for part in (_trainable(module), module.parameters()))
        context.log(
            f"{task.name}: {trainable:,} of {whole:,} parameters train; {task.sampler.num_examples:,} examples, "
            f"{task.sampler.num_steps} steps"
        )
        if config.model.trust_remote_code:
            context.log(f"WARNING: model.trust_remote_code is true: code of {config.model.path} runs in every worker")
        for note in (*task.model.notes(), *task.notes()):
            context.log(note)
    context.beat()
    engine.train_mode(False)
    task.model.check(module, lambda batch: engine.score(batch)[2].float().cpu())
    return task, engine


def passes_of(engine: Engine, context: WorkerContext, *, training: bool = False) -> Passes:
    """Scoring passes for a task. training: between its steps, where they are a sign of life and no progress of their own."""

    def score(batch: Any) -> torch.Tensor:
        if training:
            engine.train_mode(False)
        result: torch.Tensor = engine.score(batch)[2].float().cpu()
        if training:
            engine.train_mode(True)
        return result

    def report(done: int, total: int) -> None:
        if training:
            context.beat()
        else:
            context.progress("first pass", done, total)

    return Passes(engine.module, score, context.run.path, context.world, context.max_tokens, report)


def _optimizer(module: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    settings = config.optimizer
    return torch.optim.AdamW(
        _trainable(module), lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )


def _trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _size(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _restore(engine: Engine, checkpoints: CheckpointManager, context: WorkerContext) -> int:
    """Load the newest valid checkpoint and drop the rows that its steps will write again. Returns its step, or 0."""
    context.beat("restore")
    start_step = checkpoints.restore(engine)
    if context.world.is_main:
        repeated = context.run.drop_steps_after(start_step)
        if start_step:
            context.log(f"resumed after step {start_step}")
        if start_step or repeated:
            context.record({"event": "resume", "step": start_step, "repeated": repeated})
    return start_step


def _run_steps(
    engine: Engine, task: Task, reference: ReferenceLogps, saver: Saver, start_step: int, job: TrainJob, context: WorkerContext
) -> bool:
    """Put the trainer together and run it from `start_step` on. Returns False after a stop."""
    config, world, total = context.config, context.world, task.sampler.num_steps
    tracker = _open_tracker(job, context)
    rate = config.optimizer
    bad_steps_before = collectives.share_from_main(num_bad_steps(context.run.rows(), until=start_step) if world.is_main else 0)
    trainer = Trainer(
        TrainStep(engine, task, reference, task.exchange(engine.module), context.watch(engine.module), world),
        partial(learning_rate, peak=rate.lr, warmup_steps=rate.warmup_steps, total_steps=total, schedule=rate.schedule),
        open_recorder(engine, task, tracker, context),
        saver,
        context.stop_wanted,
        BadSteps(config.train.max_bad_steps, bad_steps_before),
        partial(task.after_step, passes_of(engine, context, training=True)),
    )
    ahead = steps_ahead(
        task,
        range(start_step, total),
        max_tokens=context.max_tokens,
        world=world,
        look_up=reference.look_up,
        num_workers=config.train.dataloader_num_workers,
    )
    engine.train_mode(True)
    try:
        with ahead as work:
            finished = trainer.run(with_beats(work, context.beat))
    except NotFiniteError:  # raised on all ranks at once, so a checkpoint on its way to the disk can still be committed
        saver.settle()
        raise
    finally:
        tracker.close()
    saver.settle()
    return finished


def _open_tracker(job: TrainJob, context: WorkerContext) -> Trackers:
    config, run = context.config, context.run
    if not context.world.is_main:
        return Trackers([], run.log)
    settings = dict(flat(run.config()))  # as it is written down, so that no tracker gets a secret of the environment
    gauges = None if job.gauges is None else job.gauges(run.path.name)
    return build_tracker(config.track, run.path, settings, run.log, gauges=gauges)
