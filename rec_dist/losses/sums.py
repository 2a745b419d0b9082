"""A loss returns sums and a count, never a mean, so that packing, accumulation and world size cannot change it.

G groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LossSums(NamedTuple):
    """loss_sum () in nats, with its graph; count (), its divisor after both are summed over all ranks.

    metrics: name -> () sum, without graph, to divide by the same count. A named tuple, because
    DeepSpeed's hooks find the tensors in tuples and dicts, and do not look into other objects.
    """

    loss_sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is not needed
    metrics: dict[str, Tensor]


def weights_or_ones(group_weights: Tensor | None, num_groups: int, like: Tensor) -> Tensor:
    """group_weights (G,), None for 1 each -> (G,) on the device of `like`, in its dtype or float32.

    Errors: ValueError for another shape.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if group_weights is None:
        return torch.ones(num_groups, dtype=dtype, device=like.device)
    if group_weights.shape != (num_groups,):
        raise ValueError(f"group_weights must have shape (G,) = ({num_groups},), got {tuple(group_weights.shape)}")
    return group_weights.to(device=like.device, dtype=dtype)
