"""Triton kernels of the preference losses: one program per group gives its loss, its rewards and its gradient.

Why: in PyTorch the loss is some twenty launches forward and as many back, over numbers that fit in one warp; in
preference_head it runs once per chunk, between two GEMMs, where the launches dominate.
Cost: one launch forward and one back; the gradient is kept, N float32 numbers.

N completions, G groups, K negatives of a group.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rec_dist_kernels.triton_boundary import boundary

GROUP_BLOCK = 64  # completions at a time; any K works
POOLS = {"sdpo": 0, "dpo": 0, "dmpo": 1, "mppo": 2, "dynamicpo": 3}  # POOL of preference_kernel
_UNALIGNED = (  # views into longer arrays
    *("policy_ptr", "reference_ptr", "lengths_ptr", "margins_ptr", "shares_ptr", "offsets_ptr", "loss_ptr", "weights_ptr"),
)


@triton.jit
def _softplus(x):
    """log(1 + e^x) = -log sigmoid(-x) with a small relative error also where it is near 0, and its derivative."""
    decay = tl.exp(-tl.abs(x))
    # log1p(u) = 2 artanh(u / (2 + u)); the argument is at most 1/3, so that the next term is 2e-9 of the sum. A GPU's log(1 + u)
    # is off by 1e-7 however small u is.
    s = decay / (2 + decay)
    q = s * s
    tail = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    log1p = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * tail))))
    sigmoid = tl.where(x >= 0, 1.0, decay) / (1 + decay)
    return tl.maximum(x, 0.0) + log1p, sigmoid


@triton.jit
def _rewards(policy_ptr, reference_ptr, lengths_ptr, index, inside, beta, LIKELIHOOD: tl.constexpr):
    """r and dr/d(policy) in float32: beta * (policy - reference), or beta * exp(policy / length) if LIKELIHOOD."""
    policy = tl.load(policy_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if LIKELIHOOD:
        length = tl.maximum(tl.load(lengths_ptr + index, mask=inside, other=1).to(tl.float32), 1.0)
        rewards = beta * tl.exp(policy / length)
        slopes = rewards / length
    else:
        rewards = beta * (policy - tl.load(reference_ptr + index, mask=inside, other=0.0).to(tl.float32))
        slopes = rewards * 0.0 + beta
    return rewards, slopes


@triton.jit
def _excess(rewards, positive, margins_ptr, index, inside, HAS_MARGINS: tl.constexpr):
    """e = r - r_p + margin."""
    excess = rewards - positive
    if HAS_MARGINS:
        excess += tl.load(margins_ptr + index, mask=inside, other=0.0).to(tl.float32)
    return excess


@triton.jit
def _share(
    excess, highest, total, count, some, shares_ptr, index, negative,
    POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w_i of the negatives: softmax_i(excess), 1 / K, 1 or share_i, by POOL as in preference_kernel."""
    if POOL == 0:
        share = tl.exp(tl.where(negative, excess - highest, float("-inf"))) / tl.where(some, total, 1.0)
    elif POOL == 1:
        share = 1.0 / count + tl.zeros([BLOCK], dtype=tl.float32)
    elif POOL == 2:
        share = 1.0 + tl.zeros([BLOCK], dtype=tl.float32)
    else:
        share = tl.load(shares_ptr + index, mask=negative, other=0.0)
    return share


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def preference_kernel(
    policy_ptr, reference_ptr, lengths_ptr, margins_ptr, shares_ptr, offsets_ptr, loss_ptr, rewards_ptr, slopes_ptr, beta,
    POOL: tl.constexpr, LIKELIHOOD: tl.constexpr, HAS_MARGINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x = logsumexp_i e_i (POOL 0: S-DPO, DPO), mean_i e_i (1: DMPO), sum_i e_i (2: MPPO) or sum_i share_i e_i (3: DynamicPO).

    L = softplus(x). slopes = dL/d(policy) = sigmoid(x) w_i dr_i/d(policy_i) for the negatives, with w_i = softmax_i(e), 1/K, 1 or
    share_i, and -sigmoid(x) sum_i w_i dr_p/d(policy_p) for the positive. A group without negatives has L = 0 and slopes 0.
    """
    group = tl.program_id(0)
    start = tl.load(offsets_ptr + group).to(tl.int64)
    end = tl.load(offsets_ptr + group + 1).to(tl.int64)
    some = end - start > 1
    positive, _unused = _rewards(policy_ptr, reference_ptr, lengths_ptr, start, end > start, beta, LIKELIHOOD)

    highest = float("-inf")
    total = 0.0
    weight = 0.0  # of the positive: the sum of all w_i
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < end
        rewards, _steep = _rewards(policy_ptr, reference_ptr, lengths_ptr, index, inside, beta, LIKELIHOOD)
        tl.store(rewards_ptr + index, rewards, mask=inside)
        negative = inside & (index > start)
        excess = _excess(rewards, positive, margins_ptr, index, inside, HAS_MARGINS)
        if POOL == 0:
            excess = tl.where(negative, excess, float("-inf"))
            raised = tl.maximum(highest, tl.max(excess, axis=0))
            shift = tl.where(raised == float("-inf"), 0.0, raised)
            total = total * tl.exp(highest - shift) + tl.sum(tl.exp(excess - shift), axis=0)
            highest = raised
        elif POOL == 3:
            shares = tl.load(shares_ptr + index, mask=negative, other=0.0)
            total += tl.sum(shares * tl.where(negative, excess, 0.0), axis=0)
            weight += tl.sum(shares, axis=0)
        else:
            total += tl.sum(tl.where(negative, excess, 0.0), axis=0)

    count = tl.where(some, end - start - 1, 1).to(tl.float32)
    if POOL == 0:
        pooled = tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), 0.0)
        weight = 1.0
    elif POOL == 1:
        pooled = total / count
        weight = 1.0
    else:
        pooled = total
    if POOL == 2:
        weight = count
    loss, sigmoid = _softplus(pooled)
    tl.store(loss_ptr + group, tl.where(some, loss, 0.0))

    slope = tl.where(some, sigmoid, 0.0)
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < end
        rewards, steepness = _rewards(policy_ptr, reference_ptr, lengths_ptr, index, inside, beta, LIKELIHOOD)
        excess = _excess(rewards, positive, margins_ptr, index, inside, HAS_MARGINS)
        share = _share(excess, highest, total, count, some, shares_ptr, index, inside & (index > start), POOL, BLOCK)
        tl.store(slopes_ptr + index, slope * steepness * tl.where(index > start, share, -weight), mask=inside)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def spread_kernel(slopes_ptr, weights_ptr, offsets_ptr, grads_ptr, BLOCK: tl.constexpr):
    """grads_n = weight of n's group * slopes_n; exactly 0 where the weight is, even for a slope of NaN."""
    group = tl.program_id(0)
    weight = tl.load(weights_ptr + group).to(tl.float32)
    start = tl.load(offsets_ptr + group).to(tl.int64)
    end = tl.load(offsets_ptr + group + 1).to(tl.int64)
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        slopes = tl.load(slopes_ptr + index, mask=index < end, other=0.0)
        grads = tl.where(weight == 0.0, 0.0, weight * slopes)
        tl.store(grads_ptr + index, grads.to(grads_ptr.dtype.element_ty), mask=index < end)


def preference(
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor | None,
    margins: Tensor | None,
    offsets: Tensor,
    loss: Tensor,
    rewards: Tensor,
    slopes: Tensor,
    *,
    kind: str,
    beta: float,
) -> None:
    """Fills loss (g,), rewards (N,) and slopes (N,), all float32, for the groups of offsets (g+1,), which index policy (N,).

    lengths (N,), read for mppo alone; margins (N,) or None.
    """
    shares = None
    if kind == "dynamicpo":
        shares = torch.empty_like(slopes)
        boundary(policy, offsets, shares)
    preference_kernel[(loss.shape[0],)](
        policy, reference, lengths, margins, shares, offsets, loss, rewards, slopes, beta,
        POOL=POOLS[kind], LIKELIHOOD=kind == "mppo", HAS_MARGINS=margins is not None, BLOCK=GROUP_BLOCK, num_warps=1,
    )  # fmt: skip


def spread(slopes: Tensor, weights: Tensor, offsets: Tensor, grads: Tensor) -> None:
    """Fills grads (N,) with slopes (N,) times the weights (g,) of their groups, offsets (g+1,)."""
    spread_kernel[(weights.shape[0],)](slopes, weights, offsets, grads, BLOCK=GROUP_BLOCK, num_warps=1)


class FusedPreferenceLoss(torch.autograd.Function):
    """(policy, reference (N,), offsets (G+1,), lengths, margins (N,) or None, kind, beta) -> loss (G,), rewards (N,).

    Formulas in preference_kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        policy: Tensor,
        reference: Tensor,
        offsets: Tensor,
        lengths: Tensor | None,
        margins: Tensor | None,
        kind: str,
        beta: float,
    ) -> tuple[Tensor, Tensor]:
        policy, reference, offsets = policy.contiguous(), reference.contiguous(), offsets.contiguous()
        lengths, margins = (None if array is None else array.contiguous() for array in (lengths, margins))
        loss = policy.new_empty(offsets.shape[0] - 1, dtype=torch.float32)
        rewards, slopes = policy.new_empty(2, policy.shape[0], dtype=torch.float32)
        preference(policy, reference, lengths, margins, offsets, loss, rewards, slopes, kind=kind, beta=beta)
        ctx.save_for_backward(slopes, offsets)
        ctx.dtype = policy.dtype
        ctx.mark_non_differentiable(rewards)
        return loss, rewards

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        slopes, offsets = ctx.saved_tensors
        grads = torch.empty_like(slopes, dtype=ctx.dtype)
        spread(slopes, grad_loss.contiguous(), offsets, grads)
        return grads, *(None,) * 6
