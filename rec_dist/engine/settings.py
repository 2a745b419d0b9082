"""DeepSpeed's settings: from a configuration to plain values, and from these to its JSON. Nothing is left to "auto"."""

from dataclasses import dataclass
from typing import Any

from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError

_MANY_RANKS = 64


@dataclass(frozen=True)
class EngineSettings:
    """zero_stage: 0..3. bf16: what trains is bfloat16, with a float32 copy for the optimizer; else it is float32.
    max_grad_norm: 0 for no clipping. hidden_size: the width of the model.

    frozen_bf16: frozen weights are bfloat16, also where what trains is float32.
    workers, on_gpu: what the engine runs on. At stage 3: max_live_parameters, how many elements a rank may hold gathered;
    beyond that it frees them and gathers them again. hpz_partition_size: ranks that share a second copy of the weights; 1: none.
    """

    zero_stage: int
    bf16: bool
    max_grad_norm: float
    hidden_size: int
    max_live_parameters: int = 1_000_000_000
    frozen_bf16: bool = False
    hpz_partition_size: int = 1
    workers: int = 1
    on_gpu: bool = False

    @property
    def loads_bf16(self) -> bool:
        """Whether the model is loaded in bfloat16, be it what trains or what is frozen."""
        return self.bf16 or self.frozen_bf16


def engine_settings(
    config: RunConfig,
    *,
    zero_stage: int,
    width: int,
    bf16: bool,
    workers: int,
    on_gpu: bool,
    trains_float32: bool = False,
) -> EngineSettings:
    """The settings of a run, for training, evaluation and planning.

    zero_stage: what cluster.zero_stage says, or what auto takes (sizing/stage.py). width: of the model's layers. bf16: the model
    is bfloat16. trains_float32: except what trains. Raises UserError if cluster.hpz_partition_size does not fit the workers.
    """
    check_hpz(config, workers=workers)
    return EngineSettings(
        zero_stage=zero_stage,
        bf16=bf16 and not trains_float32,
        frozen_bf16=bf16,
        max_grad_norm=config.optimizer.max_grad_norm,
        hidden_size=width,
        max_live_parameters=config.cluster.max_live_parameters,
        hpz_partition_size=config.cluster.hpz_partition_size,
        workers=workers,
        on_gpu=on_gpu,
    )


def check_hpz(config: RunConfig, *, workers: int | None) -> None:
    """Raises UserError if cluster.hpz_partition_size has no effect, or does not divide the workers. None: not known yet."""
    size, stage = config.cluster.hpz_partition_size, config.cluster.zero_stage
    if size == 1:
        return
    if stage != 3:
        raise UserError(
            f"cluster.hpz_partition_size ({size}) has no effect unless cluster.zero_stage is 3, and it is {stage}; set "
            "cluster.zero_stage=3 or cluster.hpz_partition_size=1"
        )
    if workers is not None and workers % size:
        raise UserError(
            f"cluster.hpz_partition_size ({size}) does not divide the {workers} worker(s); set it to the workers of a node, or to 1"
        )


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """The dict for deepspeed.initialize. The loop decides when accumulation ends, so its count here is 1."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage in (1, 2):
        zero |= {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000, "overlap_comm": False}
    if settings.zero_stage == 3:
        zero |= _sharded_weights(settings)
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


def _sharded_weights(settings: EngineSettings) -> dict[str, Any]:
    """The keys of stage 3."""
    gathering = settings.hpz_partition_size if settings.hpz_partition_size > 1 else settings.workers
    # After a gather of several parameters DeepSpeed 0.19.8 cuts each out of every rank's part, which takes the host 0.03 ms a
    # parameter at 8 ranks and 1.2 ms at 512 (measured on a CPU). One by one there is nothing to cut, but DeepSpeed then
    # prefetches a single parameter, so a layer's gather waits: about 1.5 ms for an 8B's over 400 Gb/s a GPU, 20 parameters. By
    # this reckoning the two cost the same between 32 and 64 ranks.
    sequential = gathering >= _MANY_RANKS
    return {
        # Norms, biases and small adapter matrices stay whole on every rank, since gathering kilobytes costs more.
        "stage3_param_persistence_threshold": 16 * settings.hidden_size,
        # A layer gathered in the forward pass is often used again at once in the backward pass.
        "stage3_max_live_parameters": settings.max_live_parameters,
        "stage3_max_reuse_distance": settings.max_live_parameters,
        "stage3_prefetch_bucket_size": 1 if sequential else min(50_000_000, settings.max_live_parameters),
        "stage3_allgather_sequential": sequential,
        "reduce_bucket_size": 50_000_000,
        # On a GPU gathers and reductions get a stream of their own; without it they wait for the computation before them.
        "overlap_comm": settings.on_gpu,
        "contiguous_gradients": True,
        "zero_hpz_partition_size": settings.hpz_partition_size,
    }
