"""Supervised fine-tuning and the preference losses: SFT, DPO, DMPO, S-DPO, MPPO, DynamicPO, RecPO.

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
  mppo   L = -log sigmoid( beta (K q_p - sum_i q_d_i) ), q_y = p_policy(y | x)^(1/|y|), without a reference    arXiv 2412.15244
  dynamicpo  L = -log sigmoid( (1/|B|) sum_{i in B} beta_i (Delta_p - Delta_d_i) )                             arXiv 2605.00327
         DMPO over the boundary negatives B alone, each with a beta of its own; rec_dist_kernels/boundary.py has both.
  recpo  L = -log sigmoid( -logsumexp_i [beta (Delta_d_i - Delta_p) + margin_i] )                              arXiv 2506.02261
         S-DPO with a margin from ratings and recency, which methods/recpo/ computes.
"""

from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.losses import LossSums, likelihood_sums, preference_sums
from rec_dist.methods.language_model.objective import REWARD_METRICS, Margins, Objective
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


def mppo(*, beta: float, num_negatives: int) -> Objective:
    """K = num_negatives >= 1, beta > 0; beta = 1 is the paper's. The rewards are likelihoods, between 0 and beta."""
    return preference_objective("mppo", beta=beta, num_negatives=num_negatives, needs_reference=False)


def dynamicpo(*, beta: float, num_negatives: int) -> Objective:
    """K = num_negatives >= 1, beta > 0."""
    return preference_objective("dynamicpo", beta=beta, num_negatives=num_negatives)


def recpo(margins: Margins, *, beta: float, num_negatives: int) -> Objective:
    """K = num_negatives >= 1, beta > 0. margins: of each group, in units of the reward."""
    return preference_objective("sdpo", name="recpo", beta=beta, num_negatives=num_negatives, margins=margins)


def preference_objective(
    kind: PreferenceKind,
    *,
    beta: float,
    num_negatives: int,
    name: str | None = None,
    needs_reference: bool = True,
    margins: Margins | None = None,
) -> Objective:
    """A preference loss, averaged over groups. name: the method's, by default `kind`.

    Raises UserError if num_negatives is below 1.
    """
    if num_negatives < 1:
        raise UserError(
            f"task.kind={name or kind} needs rejected items, and negatives.num is {num_negatives}; set negatives.num=1 or more"
        )

    def loss(logps: Tensor, batch: PackedBatch) -> LossSums:
        return preference_sums(
            logps,
            batch.reference_logps,
            batch.group_offsets,
            kind=kind,
            beta=beta,
            lengths=batch.completion_offsets.diff(),
            margins=batch.margins,
            group_weights=batch.weights,
        )

    return Objective(
        name or kind,
        num_negatives=num_negatives,
        needs_reference=needs_reference,
        counts_tokens=False,
        metric_names=REWARD_METRICS,
        loss=loss,
        preference=Preference(kind, beta),
        margins=margins,
    )
