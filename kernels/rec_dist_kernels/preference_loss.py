"""Listwise preference losses over ragged groups of completions: S-DPO, DMPO, DPO, MPPO, DynamicPO, each with margins or without.

Why one operation: they differ only in what a completion's reward is, and in how the negatives of a group are pooled before one
sigmoid. Cost: a few passes over N numbers, negligible beside the head that produced them.

N completions, G groups, K negatives of a group.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from rec_dist_kernels.boundary import boundary_shares
from rec_dist_kernels.dispatch import Impl, choose
from rec_dist_kernels.segments import check_offsets, segment_ids, segment_sum

PreferenceKind = Literal["sdpo", "dmpo", "dpo", "mppo", "dynamicpo"]


def preference_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    group_offsets: Tensor,
    *,
    kind: PreferenceKind = "sdpo",
    beta: float,
    lengths: Tensor | None = None,
    margins: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The loss of each group and the reward of each completion.

    With r = beta * (policy_logps - reference_logps), r_p that of a group's positive, r_i those of its K negatives, and the
    excess e_i = r_i - r_p + margin_i:

        sdpo:      L = -log sigmoid(-logsumexp_i(e_i))     S-DPO, arXiv 2406.09215; with margins RecPO, arXiv 2506.02261
        dmpo:      L = -log sigmoid(-(1/K) sum_i e_i)      DMPO, arXiv 2405.16127
        dpo:       L = -log sigmoid(-e_1), K = 1           DPO, arXiv 2305.18290
        mppo:      L = -log sigmoid(-sum_i e_i), with r = beta * exp(policy_logps / lengths), the mean likelihood of a
                   token, and no reference                 MPPO (Pair-MNM), arXiv 2412.15244, where beta = 1
        dynamicpo: L = -log sigmoid(-sum_i share_i e_i)    DynamicPO on DMPO, arXiv 2605.00327; boundary.py has the shares

    S-DPO spreads the gradient over the negatives by softmax_i(e_i), DMPO by 1/K, DynamicPO by constant shares; with K = 1
    S-DPO, DMPO and DPO are equal. A group with K = 0 expresses no preference: its loss and its gradient are exactly 0.

    Args:
        policy_logps: (N,) floating, log-probabilities in nats, summed over a completion's tokens.
        reference_logps: (N,) floating, the same under the reference model; a constant without gradient. mppo ignores it.
        group_offsets: (G+1,) int32 or int64 from 0 to N; the first completion of a group is the positive,
            K may differ.
        beta: the inverse temperature of the reward, positive.
        lengths: (N,) int32 or int64, the tokens of each completion; mppo needs them, others ignore them.
        margins: (N,) floating, by how much a negative's reward has to be lower, constants; None for 0. That of a positive is
            not used.

    Returns:
        loss_per_group (G,) in nats, and rewards (N,), without margins, which carry no gradient. Both float32 (float64 for
        float64 inputs), whatever the inputs are; finite for rewards of +-1e4.

    Errors: ValueError for wrong shapes, dtypes, kind or beta; offset values, and K > 1 with kind "dpo", are
    checked on the CPU only, because on a GPU the check would stall the stream ("dpo" is then computed as
    "sdpo", which it equals at K = 1).
    """
    check_preference(policy_logps, reference_logps, group_offsets, kind, beta, margins)
    if kind == "mppo" and (lengths is None or lengths.shape != policy_logps.shape):
        found = None if lengths is None else tuple(lengths.shape)
        raise ValueError(f'kind="mppo" needs lengths of shape (N,) = {tuple(policy_logps.shape)}, got {found}')
    wider = policy_logps if policy_logps.dtype == torch.float64 else reference_logps
    chosen = choose("preference_loss", impl, wider, reference=preference_loss_reference, triton=_triton)
    return chosen(policy_logps, reference_logps, group_offsets, kind=kind, beta=beta, lengths=lengths, margins=margins)


def _triton(
    policy_logps: Tensor,
    reference_logps: Tensor,
    group_offsets: Tensor,
    *,
    kind: PreferenceKind,
    beta: float,
    lengths: Tensor | None = None,
    margins: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # Imported at the first call: the package works without triton, and TRITON_INTERPRET is read at the import.
    from rec_dist_kernels.triton_preference import FusedPreferenceLoss

    arrays = (policy_logps, reference_logps, group_offsets, lengths, margins)
    loss, rewards = FusedPreferenceLoss.apply(*arrays, kind, beta)  # type: ignore[no-untyped-call]
    return loss, rewards


def preference_loss_reference(
    policy_logps: Tensor,
    reference_logps: Tensor,
    group_offsets: Tensor,
    *,
    kind: PreferenceKind,
    beta: float,
    lengths: Tensor | None = None,
    margins: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """preference_loss in plain PyTorch; arguments and results are the same, unchecked."""
    num_completions, num_groups = policy_logps.shape[0], group_offsets.shape[0] - 1
    double = torch.float64 in (policy_logps.dtype, reference_logps.dtype)
    dtype = torch.float64 if double else torch.float32
    rewards = _rewards(policy_logps.to(dtype), reference_logps.detach().to(dtype), kind, beta, lengths)  # (N,)

    ids = segment_ids(group_offsets, num_completions)  # (N,)
    positive = group_offsets.to(torch.int64)[ids]  # (N,) the index of each completion's positive
    is_negative = positive != torch.arange(num_completions, device=positive.device)
    num_negatives = segment_sum(is_negative.to(dtype), ids, num_groups)  # (G,)
    has_negatives = num_negatives > 0

    # Differences to the positive first: what a group shares, which may be 1e4, cancels before sums round it.
    excess = rewards - rewards[positive]  # (N,) 0 at the positive
    if margins is not None:
        excess = torch.where(is_negative, excess + margins.detach().to(dtype), excess)
    if kind in ("sdpo", "dpo"):
        pooled = _segment_logsumexp(excess, is_negative, ids, has_negatives)  # (G,)
    elif kind == "dynamicpo":
        pooled = segment_sum(excess * boundary_shares(policy_logps, group_offsets).to(dtype), ids, num_groups)
    else:
        pooled = segment_sum(excess, ids, num_groups)
        pooled = pooled / num_negatives.clamp(min=1) if kind == "dmpo" else pooled
    # logsigmoid, not softplus: softplus turns linear above 20, which is wrong by 2e-9 in float64.
    loss = torch.where(has_negatives, -F.logsigmoid(-pooled), 0.0)
    return loss, rewards.detach()


def _rewards(policy: Tensor, reference: Tensor, kind: str, beta: float, lengths: Tensor | None) -> Tensor:
    if kind != "mppo":
        return beta * (policy - reference)
    assert lengths is not None, "checked by the caller"
    return beta * torch.exp(policy / lengths.clamp(min=1).to(policy.dtype))


def _segment_logsumexp(values: Tensor, keep: Tensor, ids: Tensor, has_any: Tensor) -> Tensor:
    """log sum exp of the kept values of a segment, 0 if none: values, keep, ids (N,), has_any (G,) -> (G,)."""
    lowest = torch.finfo(values.dtype).min
    with torch.no_grad():  # the maximum is a shift that cancels: it needs no gradient
        highest = torch.full_like(has_any, lowest, dtype=values.dtype)
        highest = highest.scatter_reduce(0, ids, values.masked_fill(~keep, lowest), "amax")
        highest = torch.where(has_any, highest, 0.0)  # (G,)
    # Masked before exp, not after: exp of a discarded value may overflow, and 0 * inf be a NaN gradient.
    shifted = torch.where(keep, values - highest[ids], -torch.inf)
    total = segment_sum(shifted.exp(), ids, has_any.shape[0])  # (G,) at least 1 where has_any
    return highest + torch.where(has_any, total, 1.0).log()


def check_preference(
    policy: Tensor, reference: Tensor, group_offsets: Tensor, kind: str, beta: float, margins: Tensor | None
) -> None:
    """Raises ValueError for arguments that preference_loss does not take."""
    if kind not in get_args(PreferenceKind):
        raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(get_args(PreferenceKind))}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if policy.dim() != 1 or policy.shape != reference.shape:
        raise ValueError(
            f"policy_logps and reference_logps must both have shape (N,), got {tuple(policy.shape)} and {tuple(reference.shape)}"
        )
    if not (policy.is_floating_point() and reference.is_floating_point()):
        raise ValueError(f"log-probabilities must be floating, got {policy.dtype} and {reference.dtype}")
    if margins is not None and (margins.shape != policy.shape or not margins.is_floating_point()):
        found = f"{margins.dtype} of shape {tuple(margins.shape)}"
        raise ValueError(f"margins must be floating of shape (N,) = {tuple(policy.shape)}, got {found}")
    check_offsets("group_offsets", group_offsets, policy.shape[0])
    if kind == "dpo" and group_offsets.device.type == "cpu":
        largest = int(group_offsets.diff().max()) - 1 if group_offsets.shape[0] > 1 else 0
        if largest > 1:
            raise ValueError(f'kind="dpo" takes 1 negative a group, got {largest}; use "sdpo" or "dmpo" for more')
