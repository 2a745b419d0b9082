"""DMPO, Direct Multi-Preference Optimization (arXiv 2405.16127): the chosen item against the mean of K rejected ones.

L = -log sigmoid( beta * Delta_p - (1/K) * sum_i beta * Delta_i ): the mean stands inside the sigmoid, the chosen item is not
divided, K = 1 is DPO, and every rejected item has gradient weight 1/K. (The authors' released trainer computes another loss:
docs/methods/dmpo.md.)
"""

from rec_dist.tasks.method import Method
from rec_dist.tasks.preference import preference_method


def dmpo(*, beta: float, num_negatives: int) -> Method:
    """K = num_negatives >= 1, beta > 0."""
    return preference_method("dmpo", beta=beta, num_negatives=num_negatives)
