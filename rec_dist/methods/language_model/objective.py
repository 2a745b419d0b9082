"""A preference or likelihood method as the language task sees it: its loss and what it needs. One function a method makes one."""

from dataclasses import dataclass

from rec_dist.models.head import Preference
from rec_dist.models.scorer import LossFunction

REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class Objective:
    """loss: (logps (N,), batch) -> LossSums, whose metrics are named `metric_names` in this order.

    preference: the same loss as the head knows it, or None where the head gives log-probs only.
    """

    name: str
    num_negatives: int
    needs_reference: bool
    counts_tokens: bool
    metric_names: tuple[str, ...]
    loss: LossFunction
    preference: Preference | None = None
