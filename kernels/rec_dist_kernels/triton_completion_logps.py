"""completion_logps with Triton: chunks of logits by GEMM, one kernel per chunk for the log-probs, one for the gradient.

Why not one kernel that also multiplies: a cuBLAS GEMM followed by a pass over its result is as fast as a fused
kernel where D is in the thousands (chunks.py has the numbers), and needs no tuning per chip.
Cost: 1 GEMM forward; backward 2 with a frozen weight, 3 where it trains. Memory of one chunk.

T rows of the batch, D width, V vocabulary, M scored tokens, N completions, U rows to multiply, C rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rec_dist_kernels import triton_logits as kernels
from rec_dist_kernels.chunks import HeadGradients, HeadPlan, LogitsBuffer, plan_rows, rows_of_chunk
from rec_dist_kernels.segments import segment_ids


def completion_logps_triton(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    completion_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    plan: HeadPlan | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """completion_logps, unchecked. chunk_rows (default: rows_of_chunk) sets the memory."""
    limit = chunk_rows or rows_of_chunk(weight.shape[0], weight.dtype.itemsize)
    plan = plan_rows(rows) if plan is None else plan
    arrays = (None if bias is None else bias.contiguous(), targets.contiguous(), completion_offsets.contiguous())
    logps: Tensor = _CompletionLogps.apply(hidden, weight, *arrays, softcap, plan, limit)  # type: ignore[no-untyped-call]
    return logps


class _CompletionLogps(torch.autograd.Function):
    """The formulas are documented at token_logps_kernel, completion_sums_kernel and logits_gradient_kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        offsets: Tensor,
        softcap: float | None,
        plan: HeadPlan,
        limit: int,
    ) -> Tensor:
        buffer = LogitsBuffer(weight, min(limit, plan.largest))
        token_logps = hidden.new_empty(targets.shape[0], dtype=torch.float32)  # (M,)
        lse = hidden.new_empty(plan.rows.shape[0], dtype=torch.float32)  # (U,)
        for first, last in plan.ranges(limit):
            logits = buffer.logits(hidden[plan.rows[first:last]])  # (C, V)
            starts = plan.starts[first : last + 1]
            kernels.token_logps(logits, bias, softcap, plan.order, starts, targets, lse[first:last], token_logps)
        logps = hidden.new_empty(offsets.shape[0] - 1, dtype=torch.float32)  # (N,)
        kernels.completion_sums(token_logps, offsets, logps)
        ctx.save_for_backward(hidden, weight, bias, targets, offsets, lse)
        ctx.softcap, ctx.plan, ctx.limit = softcap, plan, limit
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, offsets, lse = ctx.saved_tensors
        plan: HeadPlan = ctx.plan
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        owners = segment_ids(offsets, targets.shape[0])  # (M,)
        grad_logps = grad_logps.contiguous()
        buffer = LogitsBuffer(weight, min(ctx.limit, plan.largest))
        for first, last in plan.ranges(ctx.limit):
            rows = plan.rows[first:last]  # (C,)
            inputs = hidden[rows]  # (C, D)
            logits = buffer.logits(inputs)  # (C, V)
            tokens = (plan.order, plan.starts[first : last + 1], targets, owners, grad_logps)
            kernels.logits_gradient(logits, bias, ctx.softcap, *tokens, lse[first:last], gradients.bias)
            gradients.add(logits, rows, inputs)
        return *gradients.results(), *(None,) * 5
