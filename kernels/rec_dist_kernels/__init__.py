"""Fused operations for scoring and preferring completions. Each has a plain PyTorch reference of the same
signature.

Depends on torch (and triton) only, so it can be used without the rest of rec-dist.
"""

from rec_dist_kernels.allowed_logps import AllowedChunk, AllowedPlan, allowed_logps
from rec_dist_kernels.chunks import HeadPlan, plan_groups, rows_of_chunk
from rec_dist_kernels.completion_logps import completion_logps
from rec_dist_kernels.dispatch import Impl
from rec_dist_kernels.preference_head import preference_head
from rec_dist_kernels.preference_loss import PreferenceKind, preference_loss
from rec_dist_kernels.segments import check_offsets, segment_ids

__all__ = [
    "AllowedChunk",
    "AllowedPlan",
    "HeadPlan",
    "Impl",
    "PreferenceKind",
    "allowed_logps",
    "check_offsets",
    "completion_logps",
    "plan_groups",
    "preference_head",
    "preference_loss",
    "rows_of_chunk",
    "segment_ids",
]
