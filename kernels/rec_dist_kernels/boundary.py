"""Which negatives of a group lie at the boundary of its preference, and how much each of them counts: DynamicPO.

Why apart: the weights are constants of the loss, functions of the policy's log-probs alone. Cost: a few passes over N numbers
for each of the ROUNDS of k-means, beside the head that produced them nothing.

N completions, G groups, K negatives of a group.
"""

import torch
from torch import Tensor

from rec_dist_kernels.segments import segment_ids, segment_sum

ROUNDS = 8  # of Lloyd's algorithm; three clusters of 20 numbers stand still after 2 or 3
MARGIN = 2.0  # nats; of the authors' code
SWING = 0.5  # a weight lies between 1 - SWING and 1 + SWING


def boundary_shares(policy_logps: Tensor, group_offsets: Tensor) -> Tensor:
    """The share of each completion in DynamicPO's sum: policy_logps (N,), group_offsets (G+1,) -> (N,), without a gradient.

    With v_p the log-prob of a group's positive and v_i those of its negatives:

        B = {i : v_i >= v_p}; if there are none, the highest of three clusters of the v_i
        E = the other negatives, or B if there are none
        a_i = v_p - v_i,  b_i = v_i - mean_E(v)
        share_i = (1 + 0.5 tanh((a_i - b_i - 2) / (|a_i| + |b_i|))) / |B|  for i in B, and 0 for all others

    arXiv 2605.00327; the constants and the clusters are those of the authors' code. The clusters are k-means by Lloyd's
    algorithm from the lowest value, the highest, and the one farthest from both, so that they depend on nothing but the values.
    """
    num_completions, num_groups = policy_logps.shape[0], group_offsets.shape[0] - 1
    dtype = torch.float64 if policy_logps.dtype == torch.float64 else torch.float32
    values = policy_logps.detach().to(dtype)
    ids = segment_ids(group_offsets, num_completions)  # (N,)
    positive = group_offsets.to(torch.int64)[ids]  # (N,)
    negative = positive != torch.arange(num_completions, device=positive.device)
    own = values[positive]  # (N,) v_p

    def total(kept: Tensor, of: Tensor) -> Tensor:
        return segment_sum(torch.where(kept, of, 0.0), ids, num_groups)  # (G,)

    ones = torch.ones_like(values)
    violating = negative & (values >= own)
    threshold = _highest_cluster(values, negative, ids, num_groups)  # (G,)
    chosen = torch.where((total(violating, ones) > 0)[ids], violating, negative & (values >= threshold[ids]))
    count, others = total(chosen, ones), total(negative & ~chosen, ones)  # (G,)
    easy = torch.where(
        others > 0, total(negative & ~chosen, values) / others.clamp(min=1), total(chosen, values) / count.clamp(min=1)
    )
    above, below = own - values, values - easy[ids]  # (N,) a_i, b_i
    ratio = (above - below - MARGIN) / (above.abs() + below.abs()).clamp(min=1e-30)
    return torch.where(chosen, (1 + SWING * torch.tanh(ratio)) / count.clamp(min=1)[ids], 0.0)


def _highest_cluster(values: Tensor, negative: Tensor, ids: Tensor, num_groups: int) -> Tensor:
    """(G,): from which value on a negative belongs to the highest of three clusters of its group; at most its highest value."""

    def extreme(of: Tensor, kept: Tensor, how: str) -> Tensor:
        nothing = torch.finfo(of.dtype).max * (1 if how == "amin" else -1)
        start = torch.full((num_groups,), nothing, dtype=of.dtype, device=of.device)
        return start.scatter_reduce(0, ids, of.masked_fill(~kept, nothing), how)  # (G,)

    low, high = extreme(values, negative, "amin"), extreme(values, negative, "amax")
    distance = torch.minimum(values - low[ids], high[ids] - values)  # (N,)
    farthest = negative & (distance == extreme(distance, negative, "amax")[ids])
    centres = [low, extreme(values, farthest, "amax"), high]
    for _ in range(ROUNDS):
        lower, upper = (centres[0] + centres[1]) / 2, (centres[1] + centres[2]) / 2  # (G,)
        cluster = (values >= lower[ids]).int() + (values >= upper[ids]).int()  # (N,) 0, 1 or 2
        for place in range(3):
            kept = negative & (cluster == place)
            size = segment_sum(kept.to(values.dtype), ids, num_groups)
            mean = segment_sum(torch.where(kept, values, 0.0), ids, num_groups) / size.clamp(min=1)
            centres[place] = torch.where(size > 0, mean, centres[place])
    # A mean of equal values may be rounded above them.
    return torch.minimum((centres[1] + centres[2]) / 2, high)
