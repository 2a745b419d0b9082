"""The loss on held-out targets while a run trains: the task's own loss on a fixed draw of validation units, over all ranks.

Sums are added and divided once, so world size and packing do not change it; it draws nothing and leaves weights, optimizer and the
order of training as they are. Cost: a forward pass a unit with each checkpoint, and one more at the start for a cached reference.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rec_dist.config.schema import RunConfig
from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.world import World
from rec_dist.tasks.build import build_task
from rec_dist.tasks.start import Start
from rec_dist.tasks.task import Task
from rec_dist.train.loader import step_work


def validation_task(config: RunConfig, start: Start, device: str) -> Task | None:
    """The task on the validation split, in one step of checkpoint.validation_units units; None where that is 0.

    UserError: no validation target, a unit longer than a pack, or a key that has no effect without validation.
    """
    settings = config.checkpoint
    if settings.keep_best != "none" and not settings.validation_units:
        raise UserError(f"checkpoint.keep_best={settings.keep_best} needs a validation; set checkpoint.validation_units=256, say")
    if settings.use_best and settings.keep_best == "none":
        raise UserError("checkpoint.use_best=true needs checkpoint.keep_best=valid_loss")
    if not settings.validation_units:
        return None
    task = build_task(config, start, device, split="valid")
    units = min(settings.validation_units, task.order.num_units)
    task.order = replace(task.order, units_per_step=units, epochs=1, max_steps=1)
    task.reference_key = f"{task.reference_key}-valid-{units}"
    return task


class Validation:
    """task: as validation_task() made it. prepare: as the loop's hook. record: takes the row, on rank 0."""

    def __init__(
        self,
        task: Task,
        prepare: Callable[[Any], Any],
        record: Callable[[dict[str, Any]], None],
        *,
        tokens_per_pack: int,
        world: World,
    ) -> None:
        self._task, self._prepare, self._record, self._world = task, prepare, record, world
        self._work = step_work(task, 0, tokens_per_pack=tokens_per_pack, world=world)

    def run(self, engine: Engine, step: int) -> float | None:
        """The mean loss after `step` steps, the same on every rank; None where it is not finite. A collective."""
        began = time.perf_counter()
        task, work = self._task, self._work
        totals = torch.zeros(2 + len(task.metric_names), dtype=torch.float64)
        for batch in work.batches:
            prepared = self._prepare(batch)
            engine.train_mode(False)  # an online reference has put it back into training
            totals += engine.score(prepared)[1].cpu()
        engine.train_mode(True)
        totals = process_group.sum_over_ranks(totals)
        loss = float(totals[0]) / (work.num_scored if task.counts_tokens else work.num_groups)
        finite = math.isfinite(loss)
        if self._world.is_main:
            means = {name: float(totals[2 + i]) / max(float(totals[1]), 1.0) for i, name in enumerate(task.metric_names)}
            row = {"event": "validation", "step": step, "valid_loss": loss if finite else str(loss)}
            row |= {f"valid_{name}": value if math.isfinite(value) else str(value) for name, value in means.items()}
            self._record({**row, "units": len(task.order.units_of_step(0)[0]), "seconds": time.perf_counter() - began})
        return loss if finite else None
