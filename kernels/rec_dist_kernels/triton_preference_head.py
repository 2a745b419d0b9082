"""preference_head with Triton: a chunk of whole groups goes from hidden rows to d(hidden) while its logits are in memory.

Why: a group's loss needs only its own completions. As soon as the log-probs of a chunk are known, so is their
gradient, and the logits, still in the buffer, become their own gradient. Nothing is computed twice.
Cost: 2 GEMMs with a frozen weight (completion_logps: 3), 3 where it trains (4); none in the backward pass, which
multiplies by one number. Memory of one chunk, and d(hidden) from the forward pass to the backward pass.
d(logits) are made before a loss scale is known: in float16 those under 6e-8 vanish; bfloat16 has no such limit.

T rows of the batch, D width, V vocabulary, M scored tokens, N completions, G groups, U rows to multiply, C rows of a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rec_dist_kernels import triton_logits as kernels
from rec_dist_kernels import triton_preference as preference
from rec_dist_kernels.chunks import Chunk, HeadGradients, HeadPlan, LogitsBuffer, plan_groups, rows_of_chunk
from rec_dist_kernels.segments import segment_ids


class _Setting(NamedTuple):
    """What is neither a tensor nor differentiable. with_gradients: False under no_grad, where nothing is made for a backward."""

    kind: str
    beta: float
    softcap: float | None
    with_gradients: bool


def preference_head_triton(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    completion_offsets: Tensor,
    reference_logps: Tensor,
    group_offsets: Tensor,
    *,
    kind: str,
    beta: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    margins: Tensor | None = None,
    group_weights: Tensor | None = None,
    plan: HeadPlan | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """preference_head, unchecked. chunk_rows (default: rows_of_chunk) sets the memory; a larger group still is one chunk."""
    limit = chunk_rows or rows_of_chunk(weight.shape[0], weight.dtype.itemsize)
    if plan is None or min(plan.chunk_rows, plan.largest) > limit:  # made for a smaller vocabulary
        plan = plan_groups(rows, completion_offsets, group_offsets, chunk_rows=limit)
    setting = _Setting(kind, beta, softcap, torch.is_grad_enabled())
    arrays = [targets, completion_offsets, reference_logps.detach(), group_offsets]
    loss_sum, logps = _PreferenceHead.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        None if group_weights is None else group_weights.detach().contiguous(),
        None if margins is None else margins.detach().contiguous(),
        setting,
        plan,
        *(array.contiguous() for array in arrays),
    )
    return loss_sum, logps


class _Groups:
    """Arrays over groups and completions that chunks fill in turn."""

    def __init__(
        self,
        reference: Tensor,
        completions: Tensor,
        offsets: Tensor,
        margins: Tensor | None,
        weights: Tensor | None,
        setting: _Setting,
    ) -> None:
        self._reference, self._offsets, self._weights, self._setting = reference, offsets, weights, setting
        self._lengths, self._margins = completions.diff() if setting.kind == "mppo" else None, margins  # (N,)
        self.loss = reference.new_empty(offsets.shape[0] - 1, dtype=torch.float32)  # (G,)
        self.logps = reference.new_empty(reference.shape[0], dtype=torch.float32)  # (N,)
        self._rewards, self._slopes = torch.empty_like(self.logps), torch.empty_like(self.logps)  # (N,)

    def finish(self, chunk: Chunk) -> Tensor:
        """Loss of the chunk's groups, once their log-probs are known -> (N,) d(loss)/d(logps), filled where they stand."""
        offsets = self._offsets[chunk.groups.start : chunk.groups.stop + 1]
        kind, beta = self._setting.kind, self._setting.beta
        loss = self.loss[chunk.groups]
        given, results = (self.logps, self._reference, self._lengths, self._margins), (loss, self._rewards, self._slopes)
        preference.preference(*given, offsets, *results, kind=kind, beta=beta)
        if self._weights is not None:
            weights = self._weights[chunk.groups]
            loss.copy_(torch.where(weights == 0, 0.0, loss * weights))
            preference.spread(self._slopes, weights, offsets, self._slopes)
        return self._slopes


class _PreferenceHead(torch.autograd.Function):
    """The formulas are documented at the kernels. The gradients are those of loss_sum, made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group_weights: Tensor | None,
        margins: Tensor | None,
        setting: _Setting,
        plan: HeadPlan,
        targets: Tensor,
        completion_offsets: Tensor,
        reference: Tensor,
        group_offsets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[:3] if setting.with_gradients else (False, False, False)
        groups = _Groups(reference, completion_offsets, group_offsets, margins, group_weights, setting)
        owners = segment_ids(completion_offsets, targets.shape[0])  # (M,)
        gradients = HeadGradients(hidden, weight, bias, needed)
        buffer = LogitsBuffer(weight, plan.largest)
        token_logps = hidden.new_empty(targets.shape[0], dtype=torch.float32)  # (M,)
        lse = hidden.new_empty(plan.largest, dtype=torch.float32)  # (C,)
        for chunk in plan.chunks:
            own = plan.rows[chunk.first : chunk.last]
            inputs = hidden[own]  # (C, D)
            logits = buffer.logits(inputs)  # (C, V)
            tokens = (bias, setting.softcap, plan.order, plan.starts[chunk.first : chunk.last + 1], targets)
            kernels.token_logps(logits, *tokens, lse, token_logps)
            offsets = completion_offsets[chunk.completions.start : chunk.completions.stop + 1]
            kernels.completion_sums(token_logps, offsets, groups.logps[chunk.completions])
            slopes = groups.finish(chunk)
            if gradients.any:
                kernels.logits_gradient(logits, *tokens, owners, slopes, lse, gradients.bias)
                gradients.add(logits, own, inputs)
        ctx.save_for_backward(*gradients.results())
        ctx.mark_non_differentiable(groups.logps)
        return groups.loss.sum(), groups.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if made is None else kernels.scale(made, grad_loss) for made in ctx.saved_tensors), *(None,) * 8
