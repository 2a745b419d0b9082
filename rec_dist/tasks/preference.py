"""What DPO, DMPO and S-DPO share: rewards against a reference, a loss a group, the mean over groups."""

from torch import Tensor

from rec_dist.losses import LossSums, preference_sums
from rec_dist.models.head import Preference
from rec_dist.runtime.errors import UserError
from rec_dist.stream.grouped import GroupedStream
from rec_dist.tasks.method import REWARD_METRICS, Method
from rec_dist_kernels import PreferenceKind


def preference_method(kind: PreferenceKind, *, beta: float, num_negatives: int) -> Method:
    """Raises UserError when there is nothing to prefer the chosen item to."""
    if num_negatives < 1:
        raise UserError(
            f"task.kind={kind} needs rejected items, and negatives.num is {num_negatives}; set negatives.num=1 or more"
        )

    def loss(logps: Tensor, stream: GroupedStream) -> LossSums:
        return preference_sums(
            logps, stream.reference_logps, stream.group_offsets, kind=kind, beta=beta, group_weights=stream.weights
        )

    return Method(
        kind,
        num_negatives=num_negatives,
        needs_reference=True,
        counts_tokens=False,
        metric_names=REWARD_METRICS,
        loss=loss,
        preference=Preference(kind, beta),
    )
