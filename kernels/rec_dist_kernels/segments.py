"""Ragged segments of a flat axis, given by offsets: segment s is the elements offsets[s] .. offsets[s+1]-1.

Why: groups of completions and completions of tokens are both ragged, and every operation walks them alike.
Cost: one binary search per element, and never a device synchronisation.

S segments, E elements.
"""

import torch
from torch import Tensor


def check_offsets(name: str, offsets: Tensor, num_elements: int) -> None:
    """Raises ValueError naming `name` for offsets that do not cover 0..num_elements in order.

    offsets (S+1,) int32 or int64. The values are read only on the CPU: on a GPU that would stall the stream, so
    there only shape and dtype are checked.
    """
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must have shape (segments + 1,), got {tuple(offsets.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {offsets.dtype}")
    if offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != num_elements:
        raise ValueError(f"{name} must run from 0 to {num_elements}, the number of elements, not from {first} to {last}")
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"{name} must not decrease")


def segment_ids(offsets: Tensor, num_elements: int) -> Tensor:
    """The segment of each element: offsets (S+1,) -> (num_elements,) int64. Empty segments own no element.

    >>> segment_ids(torch.tensor([0, 2, 2, 3]), 3)
    tensor([0, 0, 2])
    """
    positions = torch.arange(num_elements, device=offsets.device)
    # "right" counts the segments that end at or before a position, which skips empty ones
    return torch.searchsorted(offsets[1:].to(torch.int64).contiguous(), positions, right=True)


def segment_sum(values: Tensor, ids: Tensor, num_segments: int) -> Tensor:
    """values (E,), ids (E,) -> (S,) in the dtype of values; 0 for an empty segment. Differentiable."""
    return values.new_zeros(num_segments).index_add(0, ids, values)
