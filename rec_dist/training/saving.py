"""What a run keeps of its progress: checkpoints, with a validation before each, and at the end model/."""

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rec_dist.checkpoint.files import CheckpointMetadata
from rec_dist.checkpoint.manager import CheckpointManager, RetentionPolicy
from rec_dist.engine.engine import Engine
from rec_dist.errors import DiskError, UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.task import Task
from rec_dist.runtime import collectives
from rec_dist.runtime.environment import versions
from rec_dist.runtime.identity import identity
from rec_dist.runtime.world import World
from rec_dist.storage.checksums import write_checksums
from rec_dist.storage.disk import writing
from rec_dist.storage.files import fresh_folder, put_in_place, readable
from rec_dist.training.context import WorkerContext
from rec_dist.training.validation import Validation

_WORTH_SAYING_SECONDS, _WORTH_SAYING_SHARE = 1.0, 0.1
_GIGA = 1e9


def open_checkpoints(task: Task, initial: InitialWeights, context: WorkerContext, *, zero_stage: int) -> CheckpointManager:
    """The checkpoints of this run. zero_stage: the engine's, which is recorded."""
    config, run, world = context.config, context.run, context.world
    settings, sampler = config.checkpoint, task.sampler
    metadata = CheckpointMetadata(
        base=initial.fingerprints()["model"] if world.is_main else None,
        config=identity(config.model_dump(mode="json")),
        sampler={"seed": sampler.seed, "num_examples": sampler.num_examples, "examples_per_step": sampler.examples_per_step},
        versions=versions(),
    )
    retention = RetentionPolicy(settings.keep, settings.keep_best != "none", settings.asynchronous, settings.on_error == "stop")
    return CheckpointManager(
        run.checkpoints,
        world,
        metadata,
        retention,
        zero_stage=zero_stage,
        log=run.log,
        record=run.append,
        before_commit=run.sync_numbers,
    )


def check_host_memory(engine: Engine, world: World) -> None:
    """Raises UserError on every rank when the copies of asynchronous checkpoints do not fit in host memory. A collective."""
    share = engine.num_state_bytes() / world.size  # every rank writes as many files
    nodes: dict[str, list[float]] = {}
    for node, needed, free in collectives.gather((socket.gethostname(), share, _available_bytes())):
        total, least = nodes.get(node, [0.0, free])
        nodes[node] = [total + needed, min(least, free)]
    for node, (needed, free) in nodes.items():
        if needed > free:
            raise UserError(
                f"checkpoint.asynchronous=true needs {needed / _GIGA:.1f} GB of the memory of {node}, where "
                f"{free / _GIGA:.1f} GB are free; set checkpoint.asynchronous=false, or run fewer workers a node"
            )


def _available_bytes() -> float:
    """Free memory of the machine, or of this process's container when that has a limit."""
    available = float("inf")
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            available = float(line.split()[1]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
        available = min(available, float(text) - float(used.read_text(encoding="utf-8")))
    return available


def room_note(num_bytes: int, missing: int, folder: Path) -> str | None:
    """Return a warning when the disk of `folder` has no room for `missing` more checkpoints of num_bytes each."""
    free = shutil.disk_usage(folder).free
    if missing * num_bytes <= free:
        return None
    return (
        f"{missing} more checkpoint(s) of {num_bytes / _GIGA:.2f} GB will not fit: {folder} has {free / _GIGA:.2f} GB "
        "free; free space there, or lower checkpoint.keep (one more than it is written before the oldest goes)"
    )


class Saver:
    """Saves checkpoints, validates before those that are due, and warns when saving takes much of the time."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        checkpoints: CheckpointManager,
        validation: Validation | None,
        context: WorkerContext,
    ) -> None:
        self._engine, self._sampler, self._checkpoints = engine, task.sampler, checkpoints
        self._validation, self._context = validation, context
        self._last_end = time.perf_counter()
        settings, run = context.config.checkpoint, context.run
        missing = settings.keep + 1 + (settings.keep_best != "none") - len(checkpoints.committed())
        place = run.checkpoints if run.checkpoints.is_dir() else run.path
        if context.world.is_main and (note := room_note(engine.num_state_bytes(), missing, place)) is not None:
            run.log(f"WARNING: {note}")

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._checkpoints.writing

    def settle(self) -> None:
        """Wait for the checkpoint on its way, if there is one, and commit it. A collective."""
        self._checkpoints.settle()

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after `step` steps."""
        return step == self._sampler.num_steps or step % self._context.config.checkpoint.every_steps == 0

    def save(self, step: int) -> None:
        """Save the state after `step` steps. A collective.

        A step that only a stop saves is not validated, so stops do not change which steps are.
        """
        self._context.beat("checkpoint", step)
        valid_loss = None
        if self._validation is not None and self.due(step):
            valid_loss = self._validation.run(step)
            shown = "not finite" if valid_loss is None else f"{valid_loss:.6g}"
            self._context.log(f"validation loss after step {step}: {shown}")
        began = time.perf_counter()
        _, epochs = self._sampler.examples_of_step(step - 1)
        self._checkpoints.save(self._engine, step, epoch=int(epochs[-1]), valid_loss=valid_loss)
        now = time.perf_counter()
        note = cost_note(now - began, now - self._last_end)
        if note is not None:
            self._context.log(f"WARNING: step {step}: {note}")
        self._last_end = now


def cost_note(stall_seconds: float, since_seconds: float) -> str | None:
    """Return a warning when a save took more than a tenth of the time since the one before."""
    if stall_seconds < _WORTH_SAYING_SECONDS or stall_seconds < _WORTH_SAYING_SHARE * since_seconds:
        return None
    return (
        f"training stood still {stall_seconds:.1f} s for a checkpoint, {stall_seconds / since_seconds:.0%} of the time "
        "since the last; raise checkpoint.every_steps, set checkpoint.asynchronous=true, or use a faster disk"
    )


@contextmanager
def new_model(final: Path) -> Iterator[Path]:
    """An empty folder for a model, which becomes `final` with checksums when the block ends, whole or not at all.

    Raises DiskError.
    """
    partial = final.with_name("model.tmp")
    try:
        with writing(partial):
            fresh_folder(partial)
            yield partial
            write_checksums(partial)
            readable(partial)
            put_in_place(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_model(engine: Engine, task: Task, context: WorkerContext) -> None:
    """Write model/, whole or not at all. A collective; raises DiskError on every rank when rank 0 cannot write it."""
    weights = engine.trainable_weights()
    fault = None
    if context.world.is_main:
        try:
            with new_model(context.run.model) as folder:
                task.save(weights, engine.module, folder)
        except DiskError as error:
            fault = f"the model could not be written: {error}"
    fault = collectives.share_from_main(fault)
    if fault is not None:
        raise DiskError(fault)


def load_best(engine: Engine, checkpoints: CheckpointManager, context: WorkerContext, *, last: int) -> int:
    """Load the best checkpoint into the engine, or stay at step `last` when there is none; returns the step. A collective."""
    saved = checkpoints.load_best(engine)
    if saved is None:
        context.log("WARNING: checkpoint.use_best: no validated checkpoint is there; the model is saved from the last step")
        return last
    context.log(f"the model is saved from {saved.folder.name}, the best: validation loss {saved.valid_loss:.6g}")
    return saved.step
