"""The numbers of a plan, as `rec-dist plan --json` writes them.

inputs.py reads the configuration and the cluster; sizing/memory.py, step.py and workload.py hold the formulas; table.py prints.
"""

from dataclasses import asdict, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from rec_dist.config.schema import RunConfig
from rec_dist.engine.settings import EngineSettings
from rec_dist.errors import UserError
from rec_dist.methods.language_model.limits import check_positions
from rec_dist.methods.registry import method_of
from rec_dist.plan.advice import Change, combined_change, largest_micro_batch, single_changes
from rec_dist.plan.cluster_file import load_cluster
from rec_dist.plan.hardware import Hardware
from rec_dist.plan.inputs import (
    Length,
    hardware_of,
    run_length,
    setup_of,
    workload_of,
)
from rec_dist.plan.step import StepTime, limit, step_time
from rec_dist.plan.workload import MicroBatches, Workload, pack
from rec_dist.sizing.memory import Setup, memory
from rec_dist.sizing.stage import TRAINING, Room, StageChoice, at_stage, smallest_stage

FORMAT = 1
_SHORTER = "lower prompt.max_history or train.targets_per_prompt, or set plan.prompt_tokens to the mean of your data"


def make_plan(config: RunConfig) -> dict[str, Any]:
    """The plan of a run. Raises UserError for a run that cannot be planned, and for missing inputs."""
    prompts = method_of(config).plan(config)
    cluster = load_cluster(_cluster_file(config))
    length = run_length(config, prompts)
    means = workload_of(config, prompts, length.history)
    workload = means if config.plan.prompt_tokens else means.within(config.train.max_tokens_per_micro_batch)
    if workload.example > config.train.max_tokens_per_micro_batch:
        whole = "one prompt" if workload.prompts_per_group == 1 else f"the {workload.prompts_per_group} prompts of a group"
        raise UserError(
            f"train.max_tokens_per_micro_batch ({config.train.max_tokens_per_micro_batch}) is smaller than {whole} of mean "
            f"length ({workload.example:.0f} tokens); raise it, lower prompt.max_history, negatives.num or "
            "train.targets_per_prompt, or set plan.prompt_tokens and plan.completion_tokens to the means of your data"
        )
    setup, settings = setup_of(config, cluster, needs_reference=prompts.needs_reference)
    last = ceil(workload.prompt_rows + workload.completion) - 1
    check_positions(last, setup.shape.max_positions, what="a prompt of mean length", way_out=_SHORTER)
    hardware = hardware_of(config, cluster, workers=setup.workers, bf16=setup.element == 2)
    choice = smallest_stage(setup, settings, TRAINING, Room(hardware.memory, hardware.reserved, config.plan.margin))
    if config.cluster.zero_stage == "auto":
        setup = at_stage(setup, settings, choice.stage)
    micro_batches = pack(workload, max_tokens=setup.max_tokens, workers=setup.workers, flex=setup.flex)
    timed = partial(step_time, hardware=hardware, micro_batches=micro_batches, workload=workload, overlap=config.plan.overlap)
    time = timed(setup)
    room = _memory(config, setup, settings, hardware, smallest=ceil(workload.example))
    largest = int((room["largest_max_tokens"] or 0) // workload.example) * workload.targets * setup.workers
    return {
        "format": FORMAT,
        "cluster": {**cluster.model_dump(), "workers": setup.workers, "nodes_used": hardware.nodes},
        "model": _model(config, setup),
        "settings": _settings(config, setup),
        "memory": room | {"groups_for_largest": largest},
        "stages": _stages(choice, {stage: timed(at_stage(setup, settings, stage)) for stage in choice.needs}),
        "workload": _workload(workload, micro_batches, setup) | {"prompt_assumed": means.prompt},
        "step": _step(time, workload, peak=hardware.flops / cluster.achievable_fraction, workers=setup.workers)
        | {"limit": limit(time, fits=room["fits"], link=hardware.link[1])},
        "run": _run(length, time, setup.workers, cached=setup.reference == "cached"),
    }


def _cluster_file(config: RunConfig) -> Path:
    """plan.cluster. Raises UserError if it is not set."""
    if config.plan.cluster is None:
        raise UserError("plan.cluster is not set; give a cluster file, or the name of a shipped one, such as 8xh100")
    return Path(config.plan.cluster)


def _stages(choice: StageChoice, times: dict[int, StepTime]) -> list[dict[str, Any]]:
    """The ZeRO stages that cluster.zero_stage=auto considers: what a device needs, and the time of a step."""
    return [
        {
            "stage": stage,
            "auto": stage == choice.stage,
            "needs_bytes": needs,
            "fits": needs <= choice.device,
            "seconds": times[stage].seconds,
        }
        for stage, needs in choice.needs.items()
    ]


def _memory(config: RunConfig, setup: Setup, settings: EngineSettings, hardware: Hardware, *, smallest: int) -> dict[str, Any]:
    """The parts, and if they do not fit, changes that make them fit, each checked by the same formula."""

    def needs(changed: Setup) -> float:
        return sum(memory(changed, reserved=hardware.reserved, margin=config.plan.margin).values())

    parts = memory(setup, reserved=hardware.reserved, margin=config.plan.margin)
    total = sum(parts.values())
    singles: list[Change] = []
    both: Change | None = None
    if total > hardware.memory:
        sharded = at_stage(setup, settings, 3)
        singles = single_changes(setup, sharded, needs, hardware.memory, smallest=smallest)
        both = None if singles else combined_change(setup, sharded, needs, hardware.memory, smallest=smallest)
    return {
        "device_bytes": hardware.memory,
        "parts": parts,
        "total_bytes": total,
        "fits": total <= hardware.memory,
        "largest_max_tokens": largest_micro_batch(setup, needs, hardware.memory, smallest=smallest),
        "changes": [_change(change, hardware) for change in singles],
        "together": None if both is None else _change(both, hardware),
    }


def _change(change: Change, hardware: Hardware) -> dict[str, Any]:
    nodes = replace(hardware, workers=change.setup.workers).nodes
    return {"keys": change.keys, "needs_bytes": change.needs, "nodes": nodes}


def _model(config: RunConfig, setup: Setup) -> dict[str, Any]:
    parameters = setup.parameters
    return {
        "path": config.plan.model or config.model.path,
        "parameters": parameters.total,
        "base_parameters": parameters.total - (parameters.trainable if setup.rank or setup.soft_prompt else 0),
        "trainable": parameters.trainable,
        "tied_embeddings": parameters.tied,
        "dtype": "bfloat16" if setup.element == 2 else "float32",
        "shape": asdict(setup.shape),
    }


def _settings(config: RunConfig, setup: Setup) -> dict[str, Any]:
    return {
        "task.kind": config.task.kind,
        "adapter.kind": config.adapter.kind,
        "cluster.zero_stage": setup.zero.stage,
        "train.max_tokens_per_micro_batch": setup.max_tokens,
        "model.attention": setup.attention,
        "model.activation_checkpointing": setup.checkpointing,
        "plan.overlap": config.plan.overlap,
        "plan.margin": config.plan.margin,
    }


def _workload(workload: Workload, micro_batches: MicroBatches, setup: Setup) -> dict[str, Any]:
    whole = int(setup.max_tokens // workload.example) * workload.targets * setup.workers * micro_batches.count
    return {
        **asdict(workload),
        "prompt_rows": workload.rows,
        "micro_batches_per_step": micro_batches.count,
        "rows_per_micro_batch": micro_batches.rows,
        "fill": micro_batches.fill,
        "groups_for_full_micro_batches": whole,
    }


def _step(time: StepTime, workload: Workload, *, peak: float, workers: int) -> dict[str, Any]:
    return {
        "compute_seconds": time.compute,
        "gather_seconds": time.gather,
        "reduce_seconds": time.reduce,
        "hidden_seconds": time.hidden,
        "host_seconds": time.host,
        "seconds": time.seconds,
        "seconds_without_overlap": time.seconds + time.hidden,
        "flops": time.flops,
        "mfu": time.useful_flops / (time.seconds * peak * workers),
        "tokens_per_second": workload.num_prompts * workload.rows / time.seconds,
        "groups_per_second": workload.groups / time.seconds,
    }


def _run(length: Length, time: StepTime, workers: int, *, cached: bool) -> dict[str, Any]:
    reference = length.reference_steps * time.reference if cached else 0.0
    seconds = length.steps * time.seconds + reference
    return {
        "steps": length.steps,
        "steps_from": length.basis,
        "reference_seconds": reference,
        "seconds": seconds,
        "gpu_hours": seconds * workers / 3600,
    }
