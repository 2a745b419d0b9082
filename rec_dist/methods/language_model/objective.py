"""An objective: the loss of a method on completions, and what the task must provide for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rec_dist.models.head import Preference
from rec_dist.models.scorer import LossFunction
from rec_dist.runtime.arrays import F32, I32, I64

if TYPE_CHECKING:  # objectives need no data libraries
    from rec_dist.data.dataset.prepared_data import SequenceSplit

# (split, keys (G,), item ids of the completions (G, 1 + K)) -> (G, 1 + K): see rec_dist_kernels.preference_loss
Margins = Callable[["SequenceSplit", I64, I32], F32]

REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class Objective:
    """What a method computes from the log-probs of completions.

    loss: (logps (N,), batch) -> LossSums, whose metrics have the names `metric_names` in this order.
    preference: the same loss for the fused head, or None if the head returns log-probs only.
    counts_tokens: the loss is a mean over scored tokens, else over groups.
    margins: those of the groups of interactions, or None. They come with the batch: PackedBatch.margins.
    temperature: of a softmax over the tokens that some title of the catalogue goes on with, which come with the batch too:
        PackedBatch.allowed. None: a softmax over the vocabulary.
    """

    name: str
    num_negatives: int
    needs_reference: bool
    counts_tokens: bool
    metric_names: tuple[str, ...]
    loss: LossFunction
    preference: Preference | None = None
    margins: Margins | None = None
    temperature: float | None = None
