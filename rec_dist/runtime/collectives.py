"""Collectives on small host-side values. Without a process group, or alone in one, each returns its argument."""

from typing import Any

import torch
import torch.distributed as dist


def barrier() -> None:
    """Waits for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all ranks, the same tensor on each. One collective of values.numel() numbers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    moved = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(moved, op=dist.ReduceOp.SUM)
    return moved.to(values.device)


def share_from_main(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's picklable value in the order of ranks, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box
