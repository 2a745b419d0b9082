"""What every worker of a training run does, from joining its group to the saved model. The launcher is not known here."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rec_dist.checkpoint.manager import CheckpointManager
from rec_dist.config.schema import RunConfig
from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine, sharded_loading
from rec_dist.engine.settings import EngineSettings
from rec_dist.errors import NotFiniteError
from rec_dist.methods.build import build_task
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.task import Task
from rec_dist.runtime import collectives
from rec_dist.runtime.heartbeat import Heartbeat, pause_wanted
from rec_dist.runtime.identity import flat
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.training import loop
from rec_dist.training.bad_steps import BadSteps
from rec_dist.training.loader import prefetch, step_work, with_beats
from rec_dist.training.memory import MemoryWatch, advising, peak_bytes
from rec_dist.training.micro_batches import open_reference, preparer
from rec_dist.training.recorder import recorder
from rec_dist.training.saving import Saver, best_or_last, check_host_memory, open_checkpoints, save_model
from rec_dist.training.schedule import learning_rate
from rec_dist.training.trackers import Tracker, Trackers, build_tracker
from rec_dist.training.utilisation import utilisation_of
from rec_dist.training.validation import Validation, validation_task


@dataclass(frozen=True)
class TrainJob:
    """What the driver sends to each worker: the configuration as plain values and absolute paths.

    gauges: makes the tracker that the launcher has for a run of this name, for rank 0; None where it has none.
    """

    config: dict[str, Any]
    run_dir: str
    initial: InitialWeights
    gauges: Callable[[str], Tracker] | None = None

    def parsed(self) -> RunConfig:
        """The configuration, validated again."""
        return RunConfig.model_validate(self.config)


def train_worker(world: World, job: TrainJob) -> dict[str, Any]:
    """Trains to the end or to a stop. Returns {"finished": bool, "step": int, ...}, the same on every rank."""
    config, run = job.parsed(), RunDirectory(Path(job.run_dir))
    with Heartbeat(run.attempt, world.rank, world.node) as heart:
        heart.beat("start")
        process_group.join(world)
        with advising(config, world) as memory:
            result = _train(world, config, run, job, memory, heart)
    process_group.leave()  # not after a fault: with NCCL it would wait for peers that wait for this rank
    return result


def set_up(
    config: RunConfig, initial: InitialWeights, world: World, say: Callable[[str], None], beat: Callable[[], None] = lambda: None
) -> tuple[Task, Engine]:
    """The task, and an engine in evaluation mode around its module, checked. say: takes lines for the log, on rank 0."""
    task = build_task(config, initial, world.device)
    beat()
    settings = EngineSettings(
        zero_stage=config.cluster.zero_stage,
        bf16=task.dtype == torch.bfloat16,
        max_grad_norm=config.optimizer.max_grad_norm,
        hidden_size=task.width,
        max_live_parameters=config.cluster.max_live_parameters,
    )
    with sharded_loading(settings):
        module = task.build_module()
    beat()
    engine = Engine(module, settings, device=world.device, optimizer=_optimizer(module, config))
    trainable, whole = (sum(_size(p) for p in module.parameters() if p.requires_grad), sum(_size(p) for p in module.parameters()))
    if world.is_main:
        say(
            f"{task.name}: {trainable:,} of {whole:,} parameters train; {task.sampler.num_examples:,} examples, {task.sampler.num_steps} steps"
        )
        for note in task.notes():
            say(note)
    beat()
    engine.train_mode(False)
    task.check_module(module, lambda batch: engine.score(batch)[2].float().cpu())
    return task, engine


def _train(
    world: World, config: RunConfig, run: RunDirectory, job: TrainJob, memory: MemoryWatch, heart: Heartbeat
) -> dict[str, Any]:
    started = time.perf_counter()
    heart.beat("load")
    task, engine = set_up(config, job.initial, world, run.log, heart.beat)
    memory.start()
    heart.beat("reference")
    store = open_reference(engine, task, config, run, world, run.reference, heart.beat)
    validation = _validation(engine, config, job.initial, run, world, memory, heart.beat)
    if config.checkpoint.asynchronous:
        check_host_memory(engine, world)
    checkpoints = open_checkpoints(config, task, job.initial, run, world)
    heart.beat("restore")
    start_step = checkpoints.restore(engine)
    if world.is_main:
        repeated = run.drop_steps_after(start_step)
        if start_step:
            run.log(f"resumed after step {start_step}")
        if start_step or repeated:
            run.append({"event": "resume", "step": start_step, "repeated": repeated})
    saver = Saver(engine, task, checkpoints, validation, run, world, settings=config.checkpoint)
    prepare = preparer(engine, task, store, memory, heart.beat)
    tracker = _tracker(config, run, world, job.gauges)
    finished = _loop(engine, task, config, run, world, checkpoints, saver, prepare, start_step, heart, tracker)
    step = model_step = task.sampler.num_steps if finished else max(checkpoints.committed(), default=0)
    if finished:
        heart.beat("model")
        if config.checkpoint.use_best:
            model_step = best_or_last(engine, checkpoints, run.log if world.is_main else lambda line: None, last=step)
        save_model(engine, task, run, world)
    local, all_bytes = engine.local_parameter_bytes()
    peaks = collectives.gather((memory.loading_bytes, peak_bytes(world.device)))
    return {
        "finished": finished,
        "step": step,
        "model_step": model_step,
        "seconds": time.perf_counter() - started,
        "parameter_bytes_rank0": local,
        "parameter_bytes_whole": all_bytes,
        "peak_memory_bytes": [training for _, training in peaks],  # by rank
        "peak_loading_bytes": [loading for loading, _ in peaks],
    }


def _size(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _optimizer(module: torch.nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    settings = config.optimizer
    return torch.optim.AdamW(
        parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )


def _tracker(config: RunConfig, run: RunDirectory, world: World, gauges: Callable[[str], Tracker] | None) -> Trackers:
    if not world.is_main:
        return Trackers([], run.log)
    settings = dict(flat(config.model_dump(mode="json")))
    return build_tracker(config.track, run.path, settings, run.log, gauges=None if gauges is None else gauges(run.path.name))


def _validation(
    engine: Engine,
    config: RunConfig,
    initial: InitialWeights,
    run: RunDirectory,
    world: World,
    memory: MemoryWatch,
    beat: Callable[[], None],
) -> Validation | None:
    """The validation of this run, with the reference of the weights it starts from; None where none is wanted."""
    task = validation_task(config, initial, world.device)
    if task is None:
        return None
    store = open_reference(engine, task, config, run, world, run.valid_reference, beat)
    prepare = preparer(engine, task, store, memory, beat)
    return Validation(task, prepare, run.append, max_tokens=config.train.max_tokens_per_micro_batch, world=world)


def _loop(
    engine: Engine,
    task: Task,
    config: RunConfig,
    run: RunDirectory,
    world: World,
    checkpoints: CheckpointManager,
    checkpoint: Callable[[int], None],
    prepare: Callable[[Any], Any],
    start_step: int,
    heart: Heartbeat,
    tracker: Trackers,
) -> bool:
    total = task.sampler.num_steps

    def save(step: int) -> None:
        heart.beat("checkpoint", step)
        checkpoint(step)

    hooks = loop.Hooks(
        prepare=prepare,
        learning_rate=lambda step: learning_rate(
            step,
            peak=config.optimizer.lr,
            warmup_steps=config.optimizer.warmup_steps,
            total_steps=total,
            schedule=config.optimizer.schedule,
        ),
        stop_wanted=lambda step: run.stop_wanted(step) or pause_wanted(run.attempt, step),
        log=recorder(run, tracker, world, total=total, every_steps=config.train.log_every_steps),
        checkpoint=save,
        writing=lambda: checkpoints.writing,
        settle=checkpoints.settle,
        mfu=utilisation_of(engine.module, task.dtype, world),
    )
    max_tokens = config.train.max_tokens_per_micro_batch
    work = prefetch(lambda step: step_work(task, step, max_tokens=max_tokens, world=world), range(start_step, total))
    before = collectives.share_from_main(run.bad_steps_until(start_step) if world.is_main else 0)
    engine.train_mode(True)
    try:
        finished = loop.train(
            engine,
            task,
            with_beats(work, heart.beat),
            hooks,
            every_steps=config.checkpoint.every_steps,
            seed=config.train.seed,
            world=world,
            bad_steps=BadSteps(config.train.max_bad_steps, before),
        )
    except NotFiniteError:  # met by all ranks at once, so that what is on its way to the disk can still be committed
        checkpoints.settle()
        raise
    finally:
        tracker.close()
    checkpoints.settle()
    return finished
