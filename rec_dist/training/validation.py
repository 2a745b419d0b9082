"""The loss on held-out targets while a run trains: the task's own loss on a fixed draw of validation examples, over all ranks.

Sums are added and divided once, so world size and packing do not change the loss. A validation draws nothing and leaves
weights, optimizer and the order of training as they are. Cost: a forward pass over the examples with each checkpoint,
and one more at the start for a cached reference.
"""

import math
import time
from dataclasses import replace

import torch

from rec_dist.config.schema import RunConfig
from rec_dist.engine.engine import Engine
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task
from rec_dist.methods.task import Task
from rec_dist.runtime import collectives
from rec_dist.training.context import WorkerContext
from rec_dist.training.loader import step_work
from rec_dist.training.reference import ReferenceLogps, open_reference


def validation_task(config: RunConfig, initial: InitialWeights, device: str) -> Task | None:
    """The task on the validation split, in one step of checkpoint.validation_examples examples; None when that is 0.

    Raises UserError for a split without targets, an example longer than a micro-batch, or a key without effect.
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
    sampler = replace(task.sampler, examples_per_step=examples, epochs=1, max_steps=1)
    reference = task.reference and replace(task.reference, key=f"{task.reference.key}-valid-{examples}")
    return replace(task, sampler=sampler, reference=reference)


def open_validation(engine: Engine, initial: InitialWeights, context: WorkerContext) -> "Validation | None":
    """The validation of this run, with the reference of the weights it starts from; None when none is wanted. A collective."""
    task = validation_task(context.config, initial, context.world.device)
    if task is None:
        return None
    return Validation(engine, task, open_reference(engine, task, context, context.run.valid_reference), context)


class Validation:
    """task: as validation_task() made it."""

    def __init__(self, engine: Engine, task: Task, reference: ReferenceLogps, context: WorkerContext) -> None:
        self._engine, self._task, self._reference, self._context = engine, task, reference, context
        self._work = step_work(task, 0, max_tokens=context.max_tokens, world=context.world, look_up=reference.look_up)

    def run(self, step: int) -> float | None:
        """Return the mean loss after `step` steps, the same on every rank; None when it is not finite. A collective."""
        began = time.perf_counter()
        engine, work, names = self._engine, self._work, self._task.model.metric_names
        before_batch = self._context.watch(engine.module)
        sums: list[torch.Tensor] = []
        for batch in work.batches:
            before_batch(batch)
            compared = self._reference.attach(batch)
            engine.train_mode(False)  # an online reference has put it back into training
            sums.append(engine.score(compared)[1])
        engine.train_mode(True)
        totals = collectives.sum_over_ranks(torch.stack(sums).sum(dim=0)).cpu()
        loss = float(totals[0]) / work.count(self._task.model.mean_over)
        means = {name: float(totals[2 + i]) / max(float(totals[1]), 1.0) for i, name in enumerate(names)}
        row = {"event": "validation", "step": step, "valid_loss": _or_text(loss)}
        row |= {f"valid_{name}": _or_text(value) for name, value in means.items()}
        examples = len(self._task.sampler.examples_of_step(0)[0])
        self._context.record({**row, "examples": examples, "seconds": time.perf_counter() - began})
        return loss if math.isfinite(loss) else None


def _or_text(value: float) -> float | str:
    """The number; as text when it is not finite, since JSON knows no NaN."""
    return value if math.isfinite(value) else str(value)
