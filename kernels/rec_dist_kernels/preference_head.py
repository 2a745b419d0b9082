"""The head and the preference loss as one operation: hidden rows in, one number to minimise out.

Why one: joined, the gradient of the hidden rows can be made while the logits are at hand. The reference is
the two operations composed, and costs what they cost.

T rows, D width, V vocabulary, M scored tokens, N completions, G groups.
"""

from torch import Tensor

from rec_dist_kernels.completion_logps import completion_logps
from rec_dist_kernels.dispatch import Impl, choose
from rec_dist_kernels.preference_loss import PreferenceKind, preference_loss


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """preference_loss(completion_logps(...), ...) summed over the groups; see the two for arguments,
    formulas and errors.

    Returns: loss_sum () in nats, and logps (N,), which carry no gradient. float32 (float64 for float64
    inputs).
    """
    chosen = choose("preference_head", impl, reference=preference_head_reference)
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
) -> tuple[Tensor, Tensor]:
    """preference_head in plain PyTorch; arguments and results are the same."""
    logps = completion_logps(hidden, weight, rows, targets, completion_offsets, bias=bias, softcap=softcap, impl="reference")
    loss, _ = preference_loss(logps, reference_logps, group_offsets, kind=kind, beta=beta, impl="reference")
    return loss.sum(), logps.detach()
