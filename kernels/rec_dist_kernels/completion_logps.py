"""Log-probabilities of completions from hidden rows, without ever holding the logits of all of them.

Why: logits of M = 10,000 scored tokens and V = 128,000 words are 5 GB in float32, and their gradient as much
again. Here one chunk of rows at a time is multiplied, reduced to one number per token and dropped; the backward
pass recomputes every chunk but the last. This file is the operation and its plain reference;
triton_completion_logps.py is the fused one.
Cost: 3 GEMMs with a frozen weight where the plain way has 2, 4 where it has 3, and none more where one chunk is
all; memory of 2 or 3 chunks of _CHUNK_BYTES. Each distinct row is multiplied once: the branch point of a prompt
predicts the first token of all of its K+1 completions; at K = 15 and 5 tokens a completion, 640 tokens are 520
rows.

T rows of the batch, D width, V vocabulary, M scored tokens, N completions, U rows to multiply (HeadPlan), C rows
a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rec_dist_kernels.chunks import HeadPlan, check_plan, plan_rows
from rec_dist_kernels.dispatch import Impl, choose
from rec_dist_kernels.segments import check_offsets, segment_ids, segment_sum

_CHUNK_BYTES = 64 << 20  # of logits; on a CPU a quarter of it takes 1.2 times as long, 4 times as much saves 2 %


def completion_logps(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    completion_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    plan: HeadPlan | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The log-probability of each completion, summed over its tokens, in nats.

        logits_m = cap(weight @ hidden[rows_m] + bias)
        logp_n   = sum over the tokens m of completion n of  logits_m[targets_m] - logsumexp(logits_m)
        cap(x)   = softcap * tanh(x / softcap)                      Gemma 2, arXiv 2408.00118

    GEMMs run in the dtype of `hidden`, the softmax and all sums in float32 (float64 for float64). Autocast
    is ignored.

    Args:
        hidden: (T, D) floating, last hidden states.
        weight: (V, D), the head, of the dtype of hidden. Its gradient is skipped when it is frozen.
        rows: (M,) int64 in 0..T-1, the row that predicts each target; rows may repeat.
        targets: (M,) int64 in 0..V-1.
        completion_offsets: (N+1,) int32 or int64 from 0 to M. An empty completion has the value 0.
        bias: (V,) or None.  softcap: positive or None.
        plan: plan_groups of the same rows, if the batch has it already; without it the call makes one, for which the host waits
            for rows on a GPU.

    Returns: (N,) float32 (float64 for float64). With M = 0 it still carries a (zero) gradient to its inputs,
    so that a worker with nothing to score runs the same backward pass as its peers.

    Errors: ValueError for wrong shapes or dtypes. The values of rows, targets and offsets are checked on the
    CPU only.
    """
    check_head(hidden, weight, rows, targets, completion_offsets, bias, softcap)
    check_plan(plan, rows)
    chosen = choose("completion_logps", impl, hidden, reference=completion_logps_reference, triton=_triton)
    return chosen(hidden, weight, rows, targets, completion_offsets, bias=bias, softcap=softcap, plan=plan)


def _triton(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    completion_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    plan: HeadPlan | None = None,
) -> Tensor:
    # Imported at the first call: the package works without triton, and TRITON_INTERPRET is read at the import.
    from rec_dist_kernels.triton_completion_logps import completion_logps_triton

    return completion_logps_triton(hidden, weight, rows, targets, completion_offsets, bias=bias, softcap=softcap, plan=plan)


def completion_logps_reference(
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
    """completion_logps in plain PyTorch, unchecked. chunk_rows (default: by _CHUNK_BYTES) sets the memory."""
    if chunk_rows is None:
        chunk_rows = max(1, _CHUNK_BYTES // (weight.shape[0] * _accumulate_dtype(hidden).itemsize))
    token_logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, softcap, plan_rows(rows) if plan is None else plan, chunk_rows
    )  # (M,)
    ids = segment_ids(completion_offsets, rows.shape[0])
    return segment_sum(token_logps, ids, completion_offsets.shape[0] - 1)


class _Chunk(NamedTuple):
    """Places of HeadPlan.rows, whose rows are distinct, and the tokens that they predict."""

    places: slice  # C of the U
    tokens: Tensor  # (m,) indices into the M tokens
    local: Tensor  # (m,) each token's place, counted from the chunk's first


def _chunks(plan: HeadPlan, chunk_rows: int) -> list[_Chunk]:
    """Chunks of at most chunk_rows places."""
    bounds = plan.starts.tolist()
    places = segment_ids(plan.starts, plan.order.shape[0])  # (M,) of the tokens in their order
    chunks = []
    for first, last in plan.ranges(chunk_rows):
        tokens = slice(bounds[first], bounds[last])
        chunks.append(_Chunk(slice(first, last), plan.order[tokens], places[tokens] - first))
    return chunks


def _accumulate_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """hidden (C, D), weight (V, D) -> (C, V) in the accumulation dtype."""
    # Forward and backward may run under different autocast settings, and have to make the same logits.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden, weight).to(_accumulate_dtype(hidden))
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


class _TokenLogps(torch.autograd.Function):
    """logp_m = z_m[t_m] - logsumexp(z_m), z = cap(W h + b).

    With g_m = d(logp_m): dz = g_m (onehot(t_m) - softmax(z_m)), summed over the tokens of a row;
    dx = dz (1 - (z / softcap)^2);  dh = dx W,  dW = dx^T h,  db = sum dx.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        plan: HeadPlan,
        chunk_rows: int,
    ) -> Tensor:
        chunks = _chunks(plan, chunk_rows)
        dtype = _accumulate_dtype(hidden)
        logps = torch.empty(targets.shape[0], dtype=dtype, device=hidden.device)  # (M,)
        normaliser = torch.empty(plan.rows.shape[0], dtype=dtype, device=hidden.device)  # (U,)
        for chunk in chunks:
            logits = _logits(hidden[plan.rows[chunk.places]], weight, bias, softcap)  # (C, V)
            lse = logits.logsumexp(dim=1)  # (C,)
            logps[chunk.tokens] = logits[chunk.local, targets[chunk.tokens]] - lse[chunk.local]
            normaliser[chunk.places] = lse
        ctx.save_for_backward(hidden, weight, bias, targets, plan.rows, normaliser)
        ctx.softcap, ctx.chunks = softcap, chunks
        # The backward pass begins with the last chunk: its logits are here already, and the peak stays one chunk.
        ctx.last_logits = logits if chunks and any(ctx.needs_input_grad[:3]) else None
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, planned, normaliser = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Sums over chunks in float32: in bfloat16 the late chunks would be rounded away.
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=normaliser.dtype) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in reversed(ctx.chunks):
                rows = planned[chunk.places]  # (C,)
                kept, ctx.last_logits = ctx.last_logits, None  # overwritten below: a second backward pass makes them again
                logits = _logits(hidden[rows], weight, bias, ctx.softcap) if kept is None else kept  # (C, V)
                delta = _logits_gradient(
                    logits, normaliser[chunk.places], chunk.local, targets[chunk.tokens], grad_logps[chunk.tokens], ctx.softcap
                )
                if grad_bias is not None:
                    grad_bias += delta.sum(dim=0)
                delta = delta.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden.index_add_(0, rows, delta @ weight)  # the rows of a chunk are distinct: each is added to once
                if grad_weight is not None:
                    grad_weight += delta.T @ hidden[rows]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _logits_gradient(
    logits: Tensor, normaliser: Tensor, local: Tensor, targets: Tensor, grad: Tensor, softcap: float | None
) -> Tensor:
    """dx of _TokenLogps: logits (C, V), overwritten, normaliser (C,); a chunk's tokens local, targets, grad (m,)."""
    slope = None if softcap is None else 1 - (logits / softcap).square_()
    row_grad = grad.new_zeros(normaliser.shape[0]).index_add_(0, local, grad)  # (C,)
    delta = logits.sub_(normaliser[:, None]).exp_().mul_(-row_grad[:, None])  # (C, V)
    delta.index_put_((local, targets), grad, accumulate=True)  # a row may have one target twice
    return delta if slope is None else delta.mul_(slope)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    completion_offsets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
    """Raises ValueError for arguments that completion_logps does not take."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (T, D) and weight (V, D) must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if rows.dim() != 1 or rows.shape != targets.shape:
        raise ValueError(f"rows and targets must both have shape (M,), got {tuple(rows.shape)} and {tuple(targets.shape)}")
    for name, index, size in (("rows", rows, hidden.shape[0]), ("targets", targets, weight.shape[0])):
        if index.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {index.dtype}")
        # A negative index would count from the end, silently: padding such as -100 must not reach this far.
        if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"{name} must lie in 0..{size - 1}, got {int(index.min())}..{int(index.max())}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    check_offsets("completion_offsets", completion_offsets, rows.shape[0])
