"""The engine's settings of a training run. If cluster.zero_stage is auto, the log and metrics.jsonl say what was taken and why."""

import torch

from rec_dist.checkpoint import files as checkpoint
from rec_dist.engine.settings import EngineSettings
from rec_dist.methods.task import Task
from rec_dist.sizing.settle import line_on_stage, settled
from rec_dist.sizing.stage import TRAINING
from rec_dist.training.context import WorkerContext


def settled_for_training(task: Task, context: WorkerContext) -> EngineSettings:
    """The settings, the same on every rank. A collective.

    Raises UserError if cluster.hpz_partition_size does not fit the workers.
    """
    config, world, model = context.config, context.world, task.model
    settings, why = settled(
        config,
        model.spec,
        world,
        TRAINING,
        width=model.width,
        bf16=model.dtype == torch.bfloat16,
        reference=config.task.reference if task.reference is not None else "none",
        before=_stage_before(context),
    )
    if why is not None:
        context.log(line_on_stage(why, world))
        context.record({"event": "zero_stage", "stage": settings.zero_stage, "workers": world.size, "why": why})
    elif settings.zero_stage == 3 and world.size == 1:
        context.log("cluster.zero_stage=3 has nothing to share out on one worker and waits around every layer; auto is faster")
    return settings


def _stage_before(context: WorkerContext) -> int | None:
    """The stage of the newest checkpoint if it comes from as many workers, so that the run continues bit for bit."""
    steps = checkpoint.committed(context.run.checkpoints)
    if not steps:
        return None
    try:
        saved = checkpoint.read(checkpoint.folder_of(context.run.checkpoints, steps[-1]))
    except checkpoint.FAULTS:  # whoever loads the damaged one reports it
        return None
    return saved.zero_stage if saved.world_size == context.world.size else None
