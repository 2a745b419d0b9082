"""What a micro-batch is given just before its forward pass: its reference log-probs, looked up in the run's store or scored on the spot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rec_dist.config.schema import RunConfig
from rec_dist.engine.engine import Engine
from rec_dist.methods.task import Task
from rec_dist.models.scorer import rows_run
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.training import reference
from rec_dist.training.memory import MemoryWatch


def open_reference(
    engine: Engine,
    task: Task,
    config: RunConfig,
    run: RunDirectory,
    world: World,
    folder: Path,
    beat: Callable[[], None] = lambda: None,
) -> Any:
    """The store of cached reference log-probs in `folder`; None for a task without a reference, or with an online one."""
    if not task.needs_reference or config.task.reference == "online":
        return None

    def report(done: int, total: int) -> None:
        beat()
        if world.is_main:
            run.progress("reference", done, total)

    store, cost = reference.cached_reference(
        engine, task, folder, task.reference_key, max_tokens=config.train.max_tokens_per_micro_batch, world=world, report=report
    )
    if cost is not None and world.is_main:
        run.append({"event": "reference", **cost})
        run.log(f"reference log-probs of {cost['groups']:,} groups cached in {cost['seconds']:.1f} s")
    return store


def preparer(
    engine: Engine, task: Task, store: Any, memory: MemoryWatch, beat: Callable[[], None] = lambda: None
) -> Callable[[Any], Any]:
    """The hook that gives a batch its reference log-probs, looked up or scored, just before its forward pass."""

    def prepare(batch: Any) -> Any:
        beat()
        memory.next_micro_batch(rows_run(engine.module, batch))
        if store is not None:
            return reference.attach(store, batch)
        if task.needs_reference:
            return batch.with_reference(_online(engine, batch))
        return batch

    return prepare


def _online(engine: Engine, batch: Any) -> torch.Tensor:
    engine.train_mode(False)
    with engine.module.as_reference():  # type: ignore[operator]
        logps: torch.Tensor = engine.score(batch)[2]
    engine.train_mode(True)
    return logps.float().cpu()
