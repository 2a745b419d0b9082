"""What chance explains: exact binomial tails. A check reports a finding when chance gives as much with probability below ALPHA.

ALPHA is split among the questions that one check asks (Bonferroni), so a clean data set fails a check once in 1,000 audits.
"""

import math

import numpy as np

ALPHA = 0.001
LEVEL = 0.95  # of intervals, as in evaluation


def binomial_tail(hits: int, trials: int, rate: float) -> float:
    """P(X >= hits) for X ~ Binomial(trials, rate), summed exactly.

    It also bounds a sum of independent trials with different rates whose mean is `rate`, if hits is at least one above the
    expectation (Hoeffding, Annals of Mathematical Statistics 27, 1956).

    >>> binomial_tail(2, 2, 0.5), binomial_tail(0, 9, 0.1), binomial_tail(3, 9, 0.0)
    (0.25, 1.0, 0.0)
    """
    if hits <= 0:
        return 1.0
    if rate <= 0 or hits > trials:
        return 0.0
    if rate >= 1:
        return 1.0
    k = np.arange(hits, trials + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    logs = factorials[trials] - factorials[k] - factorials[trials - k] + k * math.log(rate) + (trials - k) * math.log1p(-rate)
    largest = float(logs.max())
    return min(1.0, math.exp(largest) * float(np.exp(logs - largest).sum()))


def probability(value: float) -> str:
    """`p = 0.02`, or `p < 1e-9` for anything smaller.

    >>> probability(0.0213), probability(1e-30)
    ('p = 0.021', 'p < 1e-9')
    """
    return "p < 1e-9" if value < 1e-9 else f"p = {value:.2g}"


def percent(share: float) -> str:
    """`62.4 %`.

    >>> percent(0.6239)
    '62.4 %'
    """
    return f"{100 * share:.1f} %"
