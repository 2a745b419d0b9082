"""What a plan is based on: the configuration, the cluster file, the model's config.json and, if it is prepared, the data.

The only place of the plan where configuration objects become plain values.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.config.shipped import existing_or_shipped
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.data.dataset.schema import MANIFEST_NAME
from rec_dist.data.sampling.targets import index_targets
from rec_dist.engine.settings import EngineSettings, engine_settings
from rec_dist.errors import UserError
from rec_dist.methods.language_model.builders import build_batch_sampler, lora_spec
from rec_dist.methods.method import PlannedPrompts
from rec_dist.models.architecture import read_architecture
from rec_dist.models.assemble import trains_float32
from rec_dist.models.pretrained import config_folder
from rec_dist.plan.cluster_file import ClusterFile
from rec_dist.plan.hardware import Hardware
from rec_dist.plan.workload import Workload
from rec_dist.sizing.memory import Setup
from rec_dist.sizing.stage import decoder_setup
from rec_dist.storage.location import Location

_FRAME_TOKENS = 16  # of a prompt besides its history: the instruction and the tail
_GIGA, _TERA, _MICRO = 1e9, 1e12, 1e-6


@dataclass(frozen=True)
class Length:
    """Length of the run: steps, steps whose reference is computed, mean items of history, and the source of these numbers."""

    steps: int
    reference_steps: int
    history: float
    basis: str


def setup_of(config: RunConfig, cluster: ClusterFile, *, needs_reference: bool) -> tuple[Setup, EngineSettings]:
    """Everything that decides memory, at cluster.zero_stage or, if that is auto, at stage 0; and the engine's settings there.

    Raises UserError for a model that cannot be planned.
    """
    if config.model.attention == "flex" and not cluster.gpu:
        raise UserError("model.attention=flex needs GPUs and plan.cluster has none; set model.attention=auto")
    folder, workers, stage = _model_folder(config), num_workers(config, cluster), config.cluster.zero_stage
    trained = config.adapter.kind == "soft_prompt"
    on_cpu_faster = not cluster.gpu and cluster.bf16_tflops > cluster.fp32_tflops
    bf16 = cluster.gpu or on_cpu_faster if config.model.dtype == "auto" else config.model.dtype == "bfloat16"
    settings = engine_settings(
        config,
        zero_stage=0 if stage == "auto" else stage,
        width=read_architecture(folder).width,
        bf16=bf16,
        trains_float32=trains_float32(config.adapter.kind != "none", bf16=bf16, on_gpu=cluster.gpu),
        workers=workers,
        on_gpu=cluster.gpu,
    )
    setup = decoder_setup(
        folder,
        settings,
        adapter=lora_spec(config),
        num_virtual=config.prompt.num_virtual if trained else 0,
        max_tokens=config.train.max_tokens_per_micro_batch,
        attention=config.model.attention,
        checkpointing=config.model.activation_checkpointing,
        reference="none" if trained or not needs_reference else config.task.reference,
        trust_remote_code=config.model.trust_remote_code,
    )
    return setup, settings


def _model_folder(config: RunConfig) -> Path:
    if config.plan.model is None:
        return config_folder(config.model.path, config.model.revision, trust_remote_code=config.model.trust_remote_code)
    folder = existing_or_shipped(config.plan.model, "plan.model", "plan/models")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"plan.model ({folder}) has no config.json; give a folder that has one, or a shipped name, such as llama3-8b"
        )
    return folder


def num_workers(config: RunConfig, cluster: ClusterFile) -> int:
    """cluster.num_workers, or as launch.sizing chooses: a worker for each GPU, and for each node where there are none."""
    wanted = config.cluster.num_workers
    if config.cluster.launcher == "local" and wanted in ("auto", 1):
        return 1
    if wanted == "auto":
        return cluster.num_devices if cluster.gpu else cluster.nodes
    if not 1 <= wanted <= cluster.num_devices:
        raise UserError(
            f"cluster.num_workers ({wanted}) must be 1 to {cluster.num_devices}, the devices of plan.cluster "
            f"({config.plan.cluster}); set it to auto or describe a larger cluster"
        )
    return wanted


def hardware_of(config: RunConfig, cluster: ClusterFile, *, workers: int, bf16: bool) -> Hardware:
    """The cluster file in bytes, seconds and achieved rates. Without GPUs, the workers of a node share its cores and memory."""
    peak = cluster.bf16_tflops if bf16 else cluster.fp32_tflops
    per_node, devices, cores = cluster.gpus_per_node, 1, 1.0
    if not cluster.gpu:
        per_node = -(-workers // cluster.nodes)
        devices = cluster.gpus_per_node // per_node
        cores = devices if config.cluster.cpus_per_worker == "auto" else config.cluster.cpus_per_worker
    return Hardware(
        memory=devices * cluster.device_memory_gb * _GIGA,
        reserved=cluster.reserved_gb * _GIGA,
        flops=cores * peak * _TERA * cluster.achievable_fraction,
        device_rate=cluster.nvlink_gb_per_second * _GIGA * cluster.link_efficiency,
        network_rate=cluster.network_gb_per_second * _GIGA * cluster.link_efficiency,
        device_latency=cluster.nvlink_latency_us * _MICRO,
        network_latency=cluster.network_latency_us * _MICRO,
        per_node=per_node,
        workers=workers,
    )


def run_length(config: RunConfig, prompts: PlannedPrompts) -> Length:
    """From the prepared data at data.path if there is any, else from train.max_steps. Raises UserError without either."""
    history = float(config.prompt.max_history)
    if Location(config.data.path).read(MANIFEST_NAME) is not None:
        split = open_data(config.data).split("train")
        starts = index_targets(split, config.train.targets_per_prompt).starts
        starts = starts[starts >= prompts.first_target]
        if len(starts):
            sampler = build_batch_sampler(config, len(starts))
            epoch = -(-len(starts) // sampler.examples_per_step)
            steps = sampler.num_steps
            history = float(np.minimum(starts, config.prompt.max_history).mean())
            once = steps if config.negatives.refresh_each_epoch else min(steps, epoch)
            return Length(steps, once, history, f"of the data at {config.data.path}")
    if config.train.max_steps is None:
        raise UserError(
            f"data.path ({config.data.path}) holds no prepared data to count steps from; "
            "set train.max_steps, or run `rec-dist prepare`"
        )
    build_batch_sampler(config, 1)  # rejects a global batch that whole prompts cannot fill
    return Length(config.train.max_steps, config.train.max_steps, history, "train.max_steps; data.path holds no prepared data")


def workload_of(config: RunConfig, prompts: PlannedPrompts, history: float) -> Workload:
    """Mean lengths, from the section `plan` or estimated from the items of history."""
    completion, listed = config.plan.completion_tokens, config.prompt.candidates == "listed"
    items = history + (config.prompt.num_candidates if listed else 0) + prompts.extra_items
    prompt = config.plan.prompt_tokens or _FRAME_TOKENS + config.prompt.num_virtual + items * completion
    return Workload(
        config.train.global_batch_size,
        config.train.targets_per_prompt,
        prompts.num_negatives,
        prompt,
        completion,
        prompts.prompts_per_group,
    )
