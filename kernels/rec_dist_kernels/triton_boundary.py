"""boundary_shares with Triton: one program per group, which walks its negatives again and again.

Why: in PyTorch it is more than a hundred launches, and in preference_head it runs once per chunk, between two GEMMs.
Cost: one launch; 2 * ROUNDS + 6 passes over the log-probs of a group, which fit in one warp.
"""

import triton
import triton.language as tl
from torch import Tensor

from rec_dist_kernels.boundary import MARGIN, ROUNDS, SWING

GROUP_BLOCK = 64  # completions at a time; any K works
_UNALIGNED = ("policy_ptr", "offsets_ptr", "shares_ptr")  # views into longer arrays


@triton.jit
def _block(policy_ptr, start, end, first, BLOCK: tl.constexpr):
    """Log-probs of the completions from `first` on in float32, and which of them are negatives of the group at `start`."""
    index = first + tl.arange(0, BLOCK)
    negative = (index > start) & (index < end)
    return index, negative, tl.load(policy_ptr + index, mask=negative, other=0.0).to(tl.float32)


@triton.jit
def _means(policy_ptr, start, end, lower, upper, c0, c1, c2, BLOCK: tl.constexpr):
    """The means of the negatives below `lower`, between, and from `upper` on; those of an empty cluster stay."""
    n1 = 0.0
    n2 = 0.0
    s0 = 0.0
    s1 = 0.0
    s2 = 0.0
    for first in range(start, end, BLOCK):
        _, negative, values = _block(policy_ptr, start, end, first, BLOCK)
        top = negative & (values >= upper)
        middle = negative & (values >= lower) & (values < upper)
        bottom = negative & (values < lower) & (values < upper)
        n1 += tl.sum(tl.where(middle, 1.0, 0.0), axis=0)
        n2 += tl.sum(tl.where(top, 1.0, 0.0), axis=0)
        s0 += tl.sum(tl.where(bottom, values, 0.0), axis=0)
        s1 += tl.sum(tl.where(middle, values, 0.0), axis=0)
        s2 += tl.sum(tl.where(top, values, 0.0), axis=0)
    n0 = tl.maximum(end - start - 1, 0).to(tl.float32) - n1 - n2
    c0 = tl.where(n0 > 0, s0 / tl.maximum(n0, 1.0), c0)
    c1 = tl.where(n1 > 0, s1 / tl.maximum(n1, 1.0), c1)
    return c0, c1, tl.where(n2 > 0, s2 / tl.maximum(n2, 1.0), c2)


@triton.jit
def _highest_cluster(policy_ptr, start, end, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """From which value on a negative belongs to the highest of three clusters; 0 for a group without negatives."""
    some = end - start > 1
    low = float("inf")
    high = float("-inf")
    for first in range(start, end, BLOCK):
        _, negative, values = _block(policy_ptr, start, end, first, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(negative, values, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(negative, values, float("-inf")), axis=0))
    far = float("-inf")
    for first in range(start, end, BLOCK):
        _, negative, values = _block(policy_ptr, start, end, first, BLOCK)
        distance = tl.where(negative, tl.minimum(values - low, high - values), float("-inf"))
        far = tl.maximum(far, tl.max(distance, axis=0))
    middle = float("-inf")
    for first in range(start, end, BLOCK):
        _, negative, values = _block(policy_ptr, start, end, first, BLOCK)
        farthest = negative & (tl.minimum(values - low, high - values) == far)
        middle = tl.maximum(middle, tl.max(tl.where(farthest, values, float("-inf")), axis=0))
    high = tl.where(some, high, 0.0)
    c0 = tl.where(some, low, 0.0)
    c1 = tl.where(some, middle, 0.0)
    c2 = high
    for _ in range(ROUNDS):
        c0, c1, c2 = _means(policy_ptr, start, end, (c0 + c1) / 2, (c1 + c2) / 2, c0, c1, c2, BLOCK)
    return tl.minimum((c1 + c2) / 2, high)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def boundary_kernel(
    policy_ptr, offsets_ptr, shares_ptr,
    MARGIN: tl.constexpr, SWING: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """boundary.boundary_shares: a threshold (v_p, or that of the highest cluster), then the means on both sides, then the shares."""
    group = tl.program_id(0)
    start = tl.load(offsets_ptr + group).to(tl.int64)
    end = tl.load(offsets_ptr + group + 1).to(tl.int64)
    own = tl.load(policy_ptr + start, mask=end > start, other=0.0).to(tl.float32)

    violating = 0.0
    for first in range(start, end, BLOCK):
        _, negative, values = _block(policy_ptr, start, end, first, BLOCK)
        violating += tl.sum(tl.where(negative & (values >= own), 1.0, 0.0), axis=0)
    threshold = tl.where(violating > 0, own, _highest_cluster(policy_ptr, start, end, ROUNDS, BLOCK))

    count = 0.0
    chosen_sum = 0.0
    easy_sum = 0.0
    for first in range(start, end, BLOCK):
        _, negative, values = _block(policy_ptr, start, end, first, BLOCK)
        chosen = negative & (values >= threshold)
        count += tl.sum(tl.where(chosen, 1.0, 0.0), axis=0)
        chosen_sum += tl.sum(tl.where(chosen, values, 0.0), axis=0)
        easy_sum += tl.sum(tl.where(negative & (values < threshold), values, 0.0), axis=0)
    others = tl.maximum(end - start - 1, 0).to(tl.float32) - count
    count = tl.maximum(count, 1.0)
    easy = tl.where(others > 0, easy_sum / tl.maximum(others, 1.0), chosen_sum / count)

    for first in range(start, end, BLOCK):
        index, negative, values = _block(policy_ptr, start, end, first, BLOCK)
        above, below = own - values, values - easy
        ratio = (above - below - MARGIN) / tl.maximum(tl.abs(above) + tl.abs(below), 1e-30)
        decay = tl.exp(-2 * tl.abs(ratio))
        tanh = tl.where(ratio < 0, -1.0, 1.0) * (1 - decay) / (1 + decay)
        share = tl.where(negative & (values >= threshold), (1 + SWING * tanh) / count, 0.0)
        tl.store(shares_ptr + index, share, mask=index < end)


def boundary(policy: Tensor, offsets: Tensor, shares: Tensor) -> None:
    """Fills shares (N,) float32 for the groups of offsets (g+1,), which index policy (N,)."""
    boundary_kernel[(offsets.shape[0] - 1,)](
        policy, offsets, shares, MARGIN=MARGIN, SWING=SWING, ROUNDS=ROUNDS, BLOCK=GROUP_BLOCK, num_warps=1
    )
