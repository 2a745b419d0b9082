"""Supervised fine-tuning: the likelihood of the chosen title after the history, a mean over its tokens.

The warm start of every preference method here: a softmax over raw likelihoods does not train from a base model, since the
length of titles dominates it.
"""

from torch import Tensor

from rec_dist.losses import LossSums, likelihood_sums
from rec_dist.stream.grouped import GroupedStream
from rec_dist.tasks.method import Method


def sft() -> Method:
    """L = -sum_t log p(y_t | x, y_<t), over all scored tokens of the step. One completion a group."""

    def loss(logps: Tensor, stream: GroupedStream) -> LossSums:
        return likelihood_sums(logps, stream.completion_offsets, group_weights=stream.completion_weights)

    return Method("sft", num_negatives=0, needs_reference=False, counts_tokens=True, metric_names=(), loss=loss)
