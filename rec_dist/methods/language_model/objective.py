"""An objective: the loss of a method on completions, and what the task must provide for it."""

from dataclasses import dataclass

from rec_dist.models.head import Preference
from rec_dist.models.scorer import LossFunction

REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class Objective:
    """What a method computes from the log-probs of completions.

    loss: (logps (N,), batch) -> LossSums, whose metrics have the names `metric_names` in this order.
    preference: the same loss for the fused head, or None if the head returns log-probs only.
    counts_tokens: the loss is a mean over scored tokens, else over groups.
    """

    name: str
    num_negatives: int
    needs_reference: bool
    counts_tokens: bool
    metric_names: tuple[str, ...]
    loss: LossFunction
    preference: Preference | None = None
