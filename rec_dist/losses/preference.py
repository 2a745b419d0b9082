"""Preference losses of a micro-batch, and its reward metrics: a layer on the kernels.

N completions, G groups, K negatives of a group.
"""

import torch
from torch import Tensor

from rec_dist.losses.sums import LossSums, weights_or_ones
from rec_dist_kernels import Impl, PreferenceKind, check_offsets, preference_loss, segment_ids


def preference_sums(
    policy_logps: Tensor,
    reference_logps: Tensor,
    group_offsets: Tensor,
    *,
    kind: PreferenceKind,
    beta: float,
    lengths: Tensor | None = None,
    margins: Tensor | None = None,
    group_weights: Tensor | None = None,
    impl: Impl = "auto",
) -> LossSums:
    """The weighted sum of preference_loss over the groups, its count and its reward metrics.

    Args:
        policy_logps, reference_logps: (N,) in nats; group_offsets (G+1,); lengths, margins (N,): see
            rec_dist_kernels.preference_loss for the formulas and their sources.
        group_weights: (G,), None for 1 each. A group of weight 0 contributes exactly 0 to every sum and
            gradient even if its log-probabilities are NaN: an empty micro-batch is a dummy group of weight 0.

    Returns: LossSums with the metrics of reward_metrics. count sums the weights of the groups that have
    negatives: a group without negatives has no preference to learn, and would only dilute the mean.

    Errors: ValueError as preference_loss, and for a wrong shape of group_weights.
    """
    check_offsets("group_offsets", group_offsets, policy_logps.shape[0])
    if policy_logps.shape != reference_logps.shape:
        shapes = f"{tuple(policy_logps.shape)} and {tuple(reference_logps.shape)}"
        raise ValueError(f"policy_logps and reference_logps must both have shape (N,), got {shapes}")
    num_groups = group_offsets.shape[0] - 1
    weights = weights_or_ones(group_weights, num_groups, policy_logps)  # (G,)
    ids = segment_ids(group_offsets, policy_logps.shape[0])  # (N,)
    # Masked before the loss: a zero weight afterwards would still multiply a NaN and its gradient.
    ignored = weights[ids] == 0  # (N,)
    loss, rewards = preference_loss(
        policy_logps.masked_fill(ignored, 0.0),
        reference_logps.masked_fill(ignored, 0.0),
        group_offsets,
        kind=kind,
        beta=beta,
        lengths=lengths,
        margins=margins,
        impl=impl,
    )
    metrics, count = reward_metrics(rewards, group_offsets, group_weights=weights)
    return LossSums((loss * weights).sum(), count, metrics)


@torch.no_grad()
def reward_metrics(
    rewards: Tensor, group_offsets: Tensor, *, group_weights: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Weighted sums over the groups that have negatives, and their count (the sum of their weights).

    For a group with the positive's reward r_p and its negatives' r_i:
        rewards/chosen = r_p,  rewards/rejected = mean_i r_i,  rewards/margins = r_p - mean_i r_i,
        rewards/accuracies = the share of negatives with r_i < r_p (a tie is not a win).

    rewards (N,), finite; group_offsets (G+1,); group_weights (G,), None for 1 each. Results are () tensors.
    """
    num_completions, num_groups = rewards.shape[0], group_offsets.shape[0] - 1
    ids = segment_ids(group_offsets, num_completions)  # (N,)
    positive = group_offsets.to(torch.int64)[ids]  # (N,)
    is_negative = positive != torch.arange(num_completions, device=positive.device)  # (N,)
    num_negatives = rewards.new_zeros(num_groups).index_add(0, ids, is_negative.to(rewards.dtype))  # (G,)
    weights = weights_or_ones(group_weights, num_groups, rewards) * (num_negatives > 0)  # (G,)

    # A negative has weight w/K, so that a sum over completions is the weighted sum of the groups' means.
    share = is_negative * (weights / num_negatives.clamp(min=1))[ids]  # (N,)
    metrics = {
        "rewards/chosen": (rewards[positive] * share).sum(),
        "rewards/rejected": (rewards * share).sum(),
        "rewards/margins": ((rewards[positive] - rewards) * share).sum(),
        "rewards/accuracies": ((rewards < rewards[positive]) * share).sum(),
    }
    return metrics, weights.sum()
