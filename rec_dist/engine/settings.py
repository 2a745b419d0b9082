"""DeepSpeed's settings: from a configuration to plain values, and from these to its JSON. Nothing is left to "auto"."""

from dataclasses import dataclass
from typing import Any

from rec_dist.config.schema import RunConfig


@dataclass(frozen=True)
class EngineSettings:
    """zero_stage: 0..3. bf16: what trains is bfloat16, with a float32 copy for the optimizer; else it is float32.
    max_grad_norm: 0 for no clipping. hidden_size: the width of the model.

    frozen_bf16: frozen weights are bfloat16, also where what trains is float32.
    max_live_parameters: at stage 3, how many elements a rank may hold gathered; beyond that it frees them and gathers
    them again.
    """

    zero_stage: int
    bf16: bool
    max_grad_norm: float
    hidden_size: int
    max_live_parameters: int = 1_000_000_000
    frozen_bf16: bool = False


def engine_settings(config: RunConfig, *, width: int, bf16: bool, trains_float32: bool = False) -> EngineSettings:
    """The settings of a run, for training, evaluation and planning. width: of the model's layers.

    bf16: the model is bfloat16. trains_float32: except what trains.
    """
    return EngineSettings(
        zero_stage=config.cluster.zero_stage,
        bf16=bf16 and not trains_float32,
        frozen_bf16=bf16,
        max_grad_norm=config.optimizer.max_grad_norm,
        hidden_size=width,
        max_live_parameters=config.cluster.max_live_parameters,
    )


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """The dict for deepspeed.initialize. The loop decides when accumulation ends, so its count here is 1."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage in (1, 2):
        zero |= {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000, "overlap_comm": False}
    if settings.zero_stage == 3:
        zero |= {
            # Norms, biases and small adapter matrices stay whole on every rank, since gathering kilobytes costs more.
            "stage3_param_persistence_threshold": 16 * settings.hidden_size,
            # A layer gathered in the forward pass is often used again at once in the backward pass.
            "stage3_max_live_parameters": settings.max_live_parameters,
            "stage3_max_reuse_distance": settings.max_live_parameters,
            "stage3_prefetch_bucket_size": min(50_000_000, settings.max_live_parameters),
            "reduce_bucket_size": 50_000_000,
            "overlap_comm": False,
            "contiguous_gradients": True,
        }
    # A bfloat16 sum over many micro-batches would depend on how they are packed. Below stage 2 DeepSpeed refuses the key.
    accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if settings.bf16 and settings.zero_stage >= 2 else {}
    return {
        **accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": settings.bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
