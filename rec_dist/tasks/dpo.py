"""DPO (arXiv 2305.18290): one chosen item against one rejected item.

L = -log sigmoid(beta * (Delta_p - Delta_d)), with Delta = log-prob under the policy minus under the reference.
"""

from rec_dist.runtime.errors import UserError
from rec_dist.tasks.method import Method
from rec_dist.tasks.preference import preference_method


def dpo(*, beta: float, num_negatives: int) -> Method:
    """Raises UserError unless num_negatives is 1: with more, DMPO and S-DPO are the methods."""
    if num_negatives != 1:
        raise UserError(
            f"task.kind=dpo compares one pair, and negatives.num is {num_negatives}; set negatives.num=1 or task.kind=dmpo"
        )
    return preference_method("dpo", beta=beta, num_negatives=1)
