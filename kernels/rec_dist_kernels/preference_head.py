"""The head and the preference loss as one operation: hidden rows in, one loss out.

Why: joined, the gradient of the hidden rows can be computed while the logits are still in memory. The reference
composes the two operations at their cost; triton_preference_head.py fuses them and saves one GEMM.

T rows, D width, V vocabulary, M scored tokens, N completions, G groups.
"""

import torch
from torch import Tensor

from rec_dist_kernels.chunks import HeadPlan, check_plan
from rec_dist_kernels.completion_logps import check_head, completion_logps_reference
from rec_dist_kernels.dispatch import Impl, choose
from rec_dist_kernels.preference_loss import PreferenceKind, check_preference, preference_loss_reference


def preference_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    completion_offsets: Tensor,
    reference_logps: Tensor,
    group_offsets: Tensor,
    *,
    kind: PreferenceKind,
    beta: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    margins: Tensor | None = None,
    group_weights: Tensor | None = None,
    plan: HeadPlan | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum over the groups of w_g L_g, with L = preference_loss(completion_logps(...), ...); see the two for
    arguments, formulas and errors. The lengths of completions are those of completion_offsets.

    group_weights (G,), None for 1 each, are constants, without gradient. A group of weight 0 contributes exactly 0 to
    the loss and to the gradient of the log-probabilities, even where these are NaN.

    plan: plan_groups(rows, completion_offsets, group_offsets), if the batch has it already.

    Returns: loss_sum () in nats, and logps (N,), which carry no gradient. float32 (float64 for float64
    inputs).
    """
    check_head(hidden, weight, rows, targets, completion_offsets, bias, softcap)
    num_completions, num_groups = completion_offsets.shape[0] - 1, group_offsets.shape[0] - 1
    if reference_logps.shape != (num_completions,):
        raise ValueError(f"reference_logps must have shape (N,) = ({num_completions},), got {tuple(reference_logps.shape)}")
    check_preference(reference_logps, reference_logps, group_offsets, kind, beta, margins)
    if group_weights is not None and group_weights.shape != (num_groups,):
        raise ValueError(f"group_weights must have shape (G,) = ({num_groups},), got {tuple(group_weights.shape)}")
    check_plan(plan, rows, num_groups)
    wider = reference_logps if reference_logps.dtype == torch.float64 else hidden
    chosen = choose("preference_head", impl, wider, reference=preference_head_reference, triton=_triton)
    return chosen(
        hidden,
        weight,
        rows,
        targets,
        completion_offsets,
        reference_logps,
        group_offsets,
        kind=kind,
        beta=beta,
        bias=bias,
        softcap=softcap,
        margins=margins,
        group_weights=group_weights,
        plan=plan,
    )


def _triton(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    completion_offsets: Tensor,
    reference_logps: Tensor,
    group_offsets: Tensor,
    *,
    kind: PreferenceKind,
    beta: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    margins: Tensor | None = None,
    group_weights: Tensor | None = None,
    plan: HeadPlan | None = None,
) -> tuple[Tensor, Tensor]:
    # Imported at the first call: the package works without triton, and TRITON_INTERPRET is read at the import.
    from rec_dist_kernels.triton_preference_head import preference_head_triton

    arrays = (hidden, weight, rows, targets, completion_offsets, reference_logps, group_offsets)
    return preference_head_triton(
        *arrays, kind=kind, beta=beta, bias=bias, softcap=softcap, margins=margins, group_weights=group_weights, plan=plan
    )


def preference_head_reference(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    completion_offsets: Tensor,
    reference_logps: Tensor,
    group_offsets: Tensor,
    *,
    kind: PreferenceKind,
    beta: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    margins: Tensor | None = None,
    group_weights: Tensor | None = None,
    plan: HeadPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """preference_head in plain PyTorch; arguments and results are the same, unchecked."""
    logps = completion_logps_reference(hidden, weight, rows, targets, completion_offsets, bias=bias, softcap=softcap, plan=plan)
    policy = logps
    if group_weights is not None:
        # Masked at the entrance: a zero weight at the exit would still multiply a NaN, and its gradient.
        ignored = (group_weights == 0).repeat_interleave(group_offsets.diff(), output_size=logps.shape[0])  # (N,)
        policy, reference_logps = logps.masked_fill(ignored, 0.0), reference_logps.masked_fill(ignored, 0.0)
    lengths = completion_offsets.diff()  # (N,)
    arrays = (policy, reference_logps, group_offsets)
    loss, _ = preference_loss_reference(*arrays, kind=kind, beta=beta, lengths=lengths, margins=margins)
    return (loss if group_weights is None else loss * group_weights.detach().to(loss.dtype)).sum(), logps.detach()
