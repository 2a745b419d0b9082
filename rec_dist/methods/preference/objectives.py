"""Supervised fine-tuning and the preference losses: SFT, DPO, DMPO, S-DPO.

Delta_y = log p_policy(y | x) - log p_reference(y | x) with log-probs summed over the tokens of y; p is the chosen item,
d_1 .. d_K are the rejected ones.

  sft    L = -sum_t log p(y_t | x, y_<t), a mean over tokens. Start every preference method from it: a softmax over raw
         likelihoods does not train from a base model, because the length of titles dominates it.
  dpo    L = -log sigmoid( beta (Delta_p - Delta_d) )                      arXiv 2305.18290; K = 1
  dmpo   L = -log sigmoid( beta Delta_p - (1/K) sum_i beta Delta_d_i )     arXiv 2405.16127
         The mean is inside the sigmoid and the chosen item's term is not divided; every rejected item has gradient weight 1/K.
         The authors' released trainer computes another loss (docs/methods/dmpo.md).
  sdpo   L = -log sigmoid( -logsumexp_i beta (Delta_d_i - Delta_p) )       arXiv 2406.09215
         The cross-entropy of [beta Delta_p, beta Delta_d_1, ...] at 0. Rejected item i has gradient weight
         softmax_i(beta Delta_d), so hard negatives count more.
"""

from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.losses import LossSums, likelihood_sums, preference_sums
from rec_dist.methods.language_model.objective import REWARD_METRICS, Objective
from rec_dist.models.head import Preference
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist_kernels import PreferenceKind


def sft() -> Objective:
    """Supervised fine-tuning; one completion per group."""

    def loss(logps: Tensor, batch: PackedBatch) -> LossSums:
        return likelihood_sums(logps, batch.completion_offsets, group_weights=batch.completion_weights)

    return Objective("sft", num_negatives=0, needs_reference=False, counts_tokens=True, metric_names=(), loss=loss)


def dpo(*, beta: float, num_negatives: int) -> Objective:
    """One pair. Raises UserError unless num_negatives is 1; use DMPO or S-DPO for more."""
    if num_negatives != 1:
        raise UserError(
            f"task.kind=dpo compares one pair, and negatives.num is {num_negatives}; set negatives.num=1 or task.kind=dmpo"
        )
    return preference_objective("dpo", beta=beta, num_negatives=1)


def dmpo(*, beta: float, num_negatives: int) -> Objective:
    """K = num_negatives >= 1, beta > 0."""
    return preference_objective("dmpo", beta=beta, num_negatives=num_negatives)


def sdpo(*, beta: float, num_negatives: int) -> Objective:
    """K = num_negatives >= 1, beta > 0."""
    return preference_objective("sdpo", beta=beta, num_negatives=num_negatives)


def preference_objective(kind: PreferenceKind, *, beta: float, num_negatives: int) -> Objective:
    """A preference loss against a reference, averaged over groups. Raises UserError if num_negatives is below 1."""
    if num_negatives < 1:
        raise UserError(
            f"task.kind={kind} needs rejected items, and negatives.num is {num_negatives}; set negatives.num=1 or more"
        )

    def loss(logps: Tensor, batch: PackedBatch) -> LossSums:
        return preference_sums(
            logps, batch.reference_logps, batch.group_offsets, kind=kind, beta=beta, group_weights=batch.weights
        )

    return Objective(
        kind,
        num_negatives=num_negatives,
        needs_reference=True,
        counts_tokens=False,
        metric_names=REWARD_METRICS,
        loss=loss,
        preference=Preference(kind, beta),
    )
