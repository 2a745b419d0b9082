"""Settles cluster.zero_stage=auto among the workers, before any of them loads the model: rank 0 decides, and all agree."""

from dataclasses import replace

from rec_dist.config.schema import RunConfig
from rec_dist.engine.settings import EngineSettings, engine_settings
from rec_dist.errors import UserError
from rec_dist.models.assemble import ModelSpec
from rec_dist.runtime import collectives
from rec_dist.runtime.world import World
from rec_dist.sizing.device import smallest_share
from rec_dist.sizing.stage import Purpose, Room, reserved_on, setup_of_spec, smallest_stage


def settled(
    config: RunConfig,
    spec: ModelSpec | None,
    world: World,
    purpose: Purpose,
    *,
    width: int,
    bf16: bool,
    reference: str = "none",
    before: int | None = None,
) -> tuple[EngineSettings, str | None]:
    """(the engine's settings with their stage, the same on every rank; if it was auto, the reason). A collective.

    spec: the model; None for a small one of our own. width, bf16: as in engine_settings. before: a stage to keep if it fits.
    Raises UserError if cluster.hpz_partition_size does not fit the workers.
    """
    wanted = config.cluster.zero_stage
    settings = engine_settings(
        config,
        zero_stage=0 if wanted == "auto" else wanted,
        width=width,
        bf16=bf16,
        trains_float32=spec is not None and spec.trains_float32,
        workers=world.size,
        on_gpu=world.device.startswith("cuda"),
    )
    if wanted != "auto":
        return settings, None
    device = smallest_share(world.device)
    room = Room(device, reserved_on(gpu=settings.on_gpu), config.plan.margin)
    tokens = config.train.max_tokens_per_micro_batch
    choice = _chosen(spec, settings, purpose, room, tokens, reference, before) if world.is_main else None
    stage, why = collectives.share_from_main(choice)
    return replace(settings, zero_stage=stage), f"stage {stage}, {why}"


def line_on_stage(why: str, world: World) -> str:
    """The line of the log on a stage that was settled. why: the reason, of settled()."""
    return f"cluster.zero_stage=auto on {world.size} worker(s): {why}"


def _chosen(
    spec: ModelSpec | None,
    settings: EngineSettings,
    purpose: Purpose,
    room: Room,
    max_tokens: int,
    reference: str,
    before: int | None,
) -> tuple[int, str]:
    """(stage, the reason)."""
    stages = purpose.stages(settings.workers, settings.bf16)
    if spec is None:
        return stages[0], "because the model is small"
    if len(stages) == 1:
        return stages[0], "the only one that makes sense on one worker"
    try:
        setup = setup_of_spec(spec, settings, max_tokens=max_tokens, reference=reference)
    except UserError as fault:  # a family that the formulas do not cover may still run
        return stages[-1], f"because what the model needs is not known: {fault}"
    choice = smallest_stage(setup, settings, purpose, room)
    if before is not None and before != choice.stage and choice.needs.get(before, room.device + 1) <= room.device:
        return before, f"which the newest checkpoint has; a new run would take stage {choice.stage}, {choice.why}"
    return choice.stage, choice.why
