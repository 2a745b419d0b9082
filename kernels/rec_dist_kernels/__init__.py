"""Fused operations for scoring and preferring completions. Each has a plain PyTorch reference of the same
signature.

Depends on torch (and triton) only, so it can be used without the rest of rec-dist.
"""

from rec_dist_kernels.completion_logps import completion_logps
from rec_dist_kernels.dispatch import Impl
from rec_dist_kernels.preference_head import preference_head
from rec_dist_kernels.preference_loss import PreferenceKind, preference_loss
from rec_dist_kernels.segments import check_offsets, segment_ids

__all__ = [
    "Impl",
    "PreferenceKind",
    "check_offsets",
    "completion_logps",
    "preference_head",
    "preference_loss",
    "segment_ids",
]
