"""The loss on held-out targets while a run trains: the task's own loss on a fixed draw of validation examples, over all ranks.

Sums are added and divided once, so world size and packing do not change it; it draws nothing and leaves weights, optimizer and the
order of training as they are. Cost: a forward pass a example with each checkpoint, and one more at the start for a cached reference.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rec_dist.config.schema import RunConfig
from rec_dist.engine.engine import Engine
from rec_dist.errors import UserError
from rec_dist.methods.build import build_task
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.task import Task
from rec_dist.runtime import collectives
from rec_dist.runtime.world import World
from rec_dist.training.loader import step_work


def validation_task(config: RunConfig, initial: InitialWeights, device: str) -> Task | None:
    """The task on the validation split, in one step of checkpoint.validation_examples examples; None where that is 0.

    UserError: no validation target, a example longer than a micro-batch, or a key that has no effect without validation.
    """
    settings = config.checkpoint
    if settings.keep_best != "none" and not settings.validation_examples:
        raise UserError(
            f"checkpoint.keep_best={settings.keep_best} needs a validation; set checkpoint.validation_examples=256, say"
        )
    if settings.use_best and settings.keep_best == "none":
        raise UserError("checkpoint.use_best=true needs checkpoint.keep_best=valid_loss")
    if not settings.validation_examples:
        return None
    task = build_task(config, initial, device, split="valid")
    examples = min(settings.validation_examples, task.sampler.num_examples)
    task.sampler = replace(task.sampler, examples_per_step=examples, epochs=1, max_steps=1)
    task.reference_key = f"{task.reference_key}-valid-{examples}"
    return task


class Validation:
    """task: as validation_task() made it. prepare: as the loop's hook. record: takes the row, on rank 0."""

    def __init__(
        self,
        task: Task,
        prepare: Callable[[Any], Any],
        record: Callable[[dict[str, Any]], None],
        *,
        max_tokens: int,
        world: World,
    ) -> None:
        self._task, self._prepare, self._record, self._world = task, prepare, record, world
        self._work = step_work(task, 0, max_tokens=max_tokens, world=world)

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
        totals = collectives.sum_over_ranks(totals)
        loss = float(totals[0]) / (work.num_scored if task.counts_tokens else work.num_groups)
        finite = math.isfinite(loss)
        if self._world.is_main:
            means = {name: float(totals[2 + i]) / max(float(totals[1]), 1.0) for i, name in enumerate(task.metric_names)}
            row = {"event": "validation", "step": step, "valid_loss": loss if finite else str(loss)}
            row |= {f"valid_{name}": value if math.isfinite(value) else str(value) for name, value in means.items()}
            self._record({**row, "examples": len(task.sampler.examples_of_step(0)[0]), "seconds": time.perf_counter() - began})
        return loss if finite else None
