"""DELRec's stage 2 (arXiv 2406.11156): the true next item among m candidates, after soft prompts that stage 1 has distilled.

L = -log( exp(s_p) / sum_i exp(s_i) ),  s_i = log p(title_i | soft prompt, history, candidates), summed over a title's tokens.
The soft prompts are frozen and LoRA trains. The formula is that of S-DPO with beta = 1 and no reference, so S-DPO's code computes
it.
"""

from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.losses import LossSums, preference_sums
from rec_dist.methods.language_model.objective import REWARD_METRICS, Objective
from rec_dist.models.head import Preference
from rec_dist.packing.packed_batch import PackedBatch


def delrec(*, num_negatives: int) -> Objective:
    """m = 1 + num_negatives candidates. The reward metrics are log-likelihoods of titles here.

    Raises UserError without negatives.
    """
    if num_negatives < 1:
        raise UserError(f"task.kind=delrec chooses among candidates, and negatives.num is {num_negatives}; set it to 1 or more")
    return Objective(
        "delrec",
        num_negatives=num_negatives,
        needs_reference=False,
        counts_tokens=False,
        metric_names=REWARD_METRICS,
        loss=choice_loss,
        preference=Preference("sdpo", 1.0),
    )


def choice_loss(logps: Tensor, batch: PackedBatch, *, group_weights: Tensor | None = None) -> LossSums:
    """The cross-entropy of each group's scores, logps (N,), with its first completion as the target.

    group_weights: (G,), None for those of the batch.
    """
    weights = batch.weights if group_weights is None else group_weights
    nothing = logps.detach() * 0  # no reference
    return preference_sums(logps, nothing, batch.group_offsets, kind="sdpo", beta=1.0, group_weights=weights)
