"""S-DPO, Softmax DPO (arXiv 2406.09215): the chosen item against a softmax over K rejected ones.

L = -log sigmoid( -logsumexp_i beta * (Delta_i - Delta_p) ), which is the cross-entropy of [beta Delta_p, beta Delta_1, ...]
at 0; K = 1 is DPO, and rejected item i has gradient weight softmax_i(beta Delta): hard negatives weigh more.
"""

from rec_dist.tasks.method import Method
from rec_dist.tasks.preference import preference_method


def sdpo(*, beta: float, num_negatives: int) -> Method:
    """K = num_negatives >= 1, beta > 0."""
    return preference_method("sdpo", beta=beta, num_negatives=num_negatives)
