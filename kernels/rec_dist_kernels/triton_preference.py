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

GROUP_BLOCK = 64  # completions at a time; any K works
_UNALIGNED = ("policy_ptr", "reference_ptr", "offsets_ptr", "loss_ptr", "weights_ptr")  # views into longer arrays


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
def _rewards(policy_ptr, reference_ptr, index, inside, beta):
    """beta * (policy - reference) in float32."""
    policy = tl.load(policy_ptr + index, mask=inside, other=0.0).to(tl.float32)
    return beta * (policy - tl.load(reference_ptr + index, mask=inside, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def preference_kernel(
    policy_ptr, reference_ptr, offsets_ptr, loss_ptr, rewards_ptr, slopes_ptr, beta,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """r = beta (policy - reference), e_i = r_i - r_p, x = mean_i e_i (MEAN: DMPO) or logsumexp_i e_i (S-DPO, DPO), L = softplus(x).

    slopes = dL/d(policy) = beta sigmoid(x) w_i for the negatives, with w_i = 1/K or softmax_i(e), and minus their
    sum for the positive. A group without negatives has L = 0 and slopes 0.
    """
    group = tl.program_id(0)
    start = tl.load(offsets_ptr + group).to(tl.int64)
    end = tl.load(offsets_ptr + group + 1).to(tl.int64)
    some = end - start > 1
    positive = _rewards(policy_ptr, reference_ptr, start, end > start, beta)

    highest = float("-inf")
    total = 0.0
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < end
        rewards = _rewards(policy_ptr, reference_ptr, index, inside, beta)
        tl.store(rewards_ptr + index, rewards, mask=inside)
        negative = inside & (index > start)
        excess = rewards - positive
        if MEAN:
            total += tl.sum(tl.where(negative, excess, 0.0), axis=0)
        else:
            excess = tl.where(negative, excess, float("-inf"))
            raised = tl.maximum(highest, tl.max(excess, axis=0))
            shift = tl.where(raised == float("-inf"), 0.0, raised)
            total = total * tl.exp(highest - shift) + tl.sum(tl.exp(excess - shift), axis=0)
            highest = raised

    count = tl.where(some, end - start - 1, 1).to(tl.float32)
    if MEAN:
        pooled = total / count
    else:
        pooled = tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), 0.0)
    loss, sigmoid = _softplus(pooled)
    tl.store(loss_ptr + group, tl.where(some, loss, 0.0))

    slope = tl.where(some, beta * sigmoid, 0.0)
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < end
        if MEAN:
            share = 1.0 / count + tl.zeros([BLOCK], dtype=tl.float32)
        else:
            excess = _rewards(policy_ptr, reference_ptr, index, inside, beta) - positive
            share = tl.exp(tl.where(inside & (index > start), excess - highest, float("-inf"))) / tl.where(some, total, 1.0)
        tl.store(slopes_ptr + index, tl.where(index > start, slope * share, -slope), mask=inside)


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
    policy: Tensor, reference: Tensor, offsets: Tensor, loss: Tensor, rewards: Tensor, slopes: Tensor, *, kind: str, beta: float
) -> None:
    """Fills loss (g,), rewards (N,) and slopes (N,), all float32, for the groups of offsets (g+1,), which index policy (N,)."""
    preference_kernel[(loss.shape[0],)](
        policy, reference, offsets, loss, rewards, slopes, beta, MEAN=kind == "dmpo", BLOCK=GROUP_BLOCK, num_warps=1
    )


def spread(slopes: Tensor, weights: Tensor, offsets: Tensor, grads: Tensor) -> None:
    """Fills grads (N,) with slopes (N,) times the weights (g,) of their groups, offsets (g+1,)."""
    spread_kernel[(weights.shape[0],)](slopes, weights, offsets, grads, BLOCK=GROUP_BLOCK, num_warps=1)


class FusedPreferenceLoss(torch.autograd.Function):
    """(policy (N,), reference (N,), offsets (G+1,), kind, beta) -> loss (G,), rewards (N,); formulas in preference_kernel."""

    @staticmethod
    def forward(ctx: Any, policy: Tensor, reference: Tensor, offsets: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
        policy, reference, offsets = policy.contiguous(), reference.contiguous(), offsets.contiguous()
        loss = policy.new_empty(offsets.shape[0] - 1, dtype=torch.float32)
        rewards, slopes = policy.new_empty(2, policy.shape[0], dtype=torch.float32)
        preference(policy, reference, offsets, loss, rewards, slopes, kind=kind, beta=beta)
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
        return grads, None, None, None, None
