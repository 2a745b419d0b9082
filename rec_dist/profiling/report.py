"""Merges what the ranks measured into one report, the content of profile.json. Every number says what it is a share of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rec_dist.config.schema import RunConfig
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.models.size import WeightCount
from rec_dist.profiling.phases import StepTime, lag, speed
from rec_dist.profiling.trace import Traced
from rec_dist.training import flops
from rec_dist.training.utilisation import peak_flops

PROFILE_NAME, FORMAT = "profile.json", 1


@dataclass(frozen=True)
class RankRecord:
    """One rank's measurements. `again` repeats `real` after `synthetic`.

    rows_*: over the counted steps of real data; recompilations: since the warm-up.
    """

    real: list[StepTime]
    synthetic: list[StepTime]
    again: list[StepTime]
    rows_used: int
    rows_run: int
    rows_scored: int
    peak_bytes: int
    total_bytes: int
    static_bytes: int
    bytes_per_token: float | None
    recompilations: int
    traced: Traced


def merge(
    ranks: Sequence[RankRecord],
    config: RunConfig,
    weights: WeightCount | None,
    *,
    dtype: torch.dtype,
    device: str,
    sampler: GlobalBatchSampler,
    zero_stage: int,
) -> dict[str, Any]:
    """Merge the records of all ranks into the report."""
    real, synthetic, again = (speed([getattr(rank, name) for rank in ranks]) for name in ("real", "synthetic", "again"))
    run, used = sum(rank.rows_run for rank in ranks), sum(rank.rows_used for rank in ranks)
    traced = [rank.traced for rank in ranks]
    return {
        "format": FORMAT,
        "settings": _settings(config, ranks, dtype, device, sampler) | {"cluster.zero_stage": zero_stage},
        "real": real,
        "synthetic": synthetic,
        "real_again": again,
        "data_cost": 1.0 - again["tokens_per_second"] / synthetic["tokens_per_second"],
        "padding_share": 1.0 - used / run,
        "compute": _compute(ranks, config, weights, real, dtype=dtype, device=device),
        "communication": {
            "share_of_traced_step": sum(t.collective_seconds for t in traced) / sum(t.seconds for t in traced),
            "basis": "one traced step: time with a collective running, mean over ranks; part of the phases, includes waits",
        },
        "memory": _memory(ranks, device),
        "ranks": lag([rank.real for rank in ranks]),
        "recompilations_after_warmup": max(rank.recompilations for rank in ranks),
        "files": [name for t in traced for name in t.files],
    }


def _settings(
    config: RunConfig, ranks: Sequence[RankRecord], dtype: torch.dtype, device: str, sampler: GlobalBatchSampler
) -> dict[str, Any]:
    """The settings that a comparison with another report must know, since numbers depend on them."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {
        "model.path": config.model.path,
        "task.kind": config.task.kind,
        "adapter.kind": config.adapter.kind,
        "negatives.num": config.negatives.num,
        "train.global_batch_size": config.train.global_batch_size,
        "train.targets_per_prompt": config.train.targets_per_prompt,
        "train.max_tokens_per_micro_batch": config.train.max_tokens_per_micro_batch,
        "model.attention": config.model.attention,
        "model.fused_layers": config.model.fused_layers,
        "model.activation_checkpointing": config.model.activation_checkpointing,
        "workers": len(ranks),
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "distinct_steps": sampler.num_steps,  # fewer than the steps run: some were run again
    }


def _compute(
    ranks: Sequence[RankRecord],
    config: RunConfig,
    weights: WeightCount | None,
    real: dict[str, Any],
    *,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Any]:
    peak, source = peak_flops(device, dtype)
    result: dict[str, Any] = {"peak_flops": peak, "peak_source": source, "formula": flops.FORMULA}
    if weights is None:
        return {**result, "mfu": None, "hfu": None, "why": "operations are counted for dense language models only"}
    tokens, rows = real["tokens"], sum(rank.rows_scored for rank in ranks)
    count = {"frozen": weights.frozen, "training": weights.training, "head": weights.head}
    once = flops.step_flops(tokens, rows, **count, head_trains=weights.head_trains)
    twice = flops.recomputed_flops(tokens, rows, **count, checkpointing=config.model.activation_checkpointing)
    seconds = real["step_seconds"]["mean"] * real["steps"]
    return {
        **result,
        "weights": {**count, "head_trains": weights.head_trains},
        "scored_rows": rows,
        "flops": once,
        "flops_recomputed": twice,
        "flops_per_token": once / tokens,
        "mfu": flops.utilisation(once, seconds, peak, len(ranks)),
        "hfu": flops.utilisation(once + twice, seconds, peak, len(ranks)),
    }


def _memory(ranks: Sequence[RankRecord], device: str) -> dict[str, Any]:
    fullest = max(range(len(ranks)), key=lambda rank: ranks[rank].peak_bytes / ranks[rank].total_bytes)
    rank = ranks[fullest]
    on_gpu = device.startswith("cuda")
    return {
        "basis": "torch's CUDA allocator" if on_gpu else "resident pages of the worker, against the machine's memory",
        "fullest_rank": fullest,
        "peak_bytes": rank.peak_bytes,
        "total_bytes": rank.total_bytes,
        "headroom_share": 1.0 - rank.peak_bytes / rank.total_bytes,
        "before_first_micro_batch_bytes": rank.static_bytes,
        "activation_bytes_per_token": rank.bytes_per_token,
    }
