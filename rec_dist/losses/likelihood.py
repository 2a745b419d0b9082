"""Supervised fine-tuning: the negative log-likelihood of completions, as a sum over tokens and their number.

N completions.
"""

from torch import Tensor

from rec_dist.losses.sums import LossSums, weights_or_ones


def likelihood_sums(logps: Tensor, completion_offsets: Tensor, *, group_weights: Tensor | None = None) -> LossSums:
    """loss_sum = -sum_n w_n logp_n and count = sum_n w_n tokens_n, in nats; their ratio is the mean per token.

    Args:
        logps: (N,) in nats, summed over a completion's tokens: the output of rec_dist_kernels.completion_logps.
        completion_offsets: (N+1,), where the tokens of each completion begin and end.
        group_weights: (N,), None for 1 each; every completion is its own group here. One of weight 0
            contributes exactly 0 to sums and gradients, even where its log-probability is NaN.

    Returns: LossSums without metrics. Errors: ValueError for wrong shapes.
    """
    num_completions = completion_offsets.shape[0] - 1
    if logps.shape != (num_completions,):
        raise ValueError(f"logps must have shape (N,) = ({num_completions},), got {tuple(logps.shape)}")
    weights = weights_or_ones(group_weights, num_completions, logps)  # (N,)
    kept = logps.to(weights.dtype).masked_fill(weights == 0, 0.0)  # masked, because 0 * NaN is NaN
    return LossSums(-(kept * weights).sum(), (completion_offsets.diff() * weights).sum().detach(), {})
