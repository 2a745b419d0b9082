"""The weights of an ensemble: a listwise softmax over all candidates, which is convex in them.

    s_q = X_q w              L(w) = mean_q (logsumexp(s_q) - s_q[target]) + ridge / 2 |w|^2

A constant that a member adds to all items of a question cancels, so members need no common zero. A feature is divided by one
scale for all questions, so that the ridge treats all features alike.

Q questions, C candidates (the whole catalogue, unless told otherwise), F features.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
_QUESTIONS_AT_ONCE = 64  # so that the softmax of a block stays in the cache


@dataclass(frozen=True)
class Questions:
    """features (Q, C, F) float32; targets (Q,) places among the candidates; ranked (Q, C) bool: false where a question has fewer."""

    features: F32
    targets: npt.NDArray[np.int64]
    ranked: npt.NDArray[np.bool_]

    def scales(self) -> F64:
        """(F,): the standard deviation of each feature around its mean in a question; 1 for a feature that never varies."""
        total = np.zeros(self.features.shape[2])
        for values, ranked in zip(self.features, self.ranked, strict=True):
            total += values[ranked].astype(np.float64).var(axis=0)
        deviations = np.sqrt(total / len(self.targets))
        return np.where(deviations > 0, deviations, 1.0)


def fit_weights(questions: Questions, scales: F64, *, at_least: F64, ridge: float, used: npt.NDArray[np.bool_]) -> F64:
    """The weights (F,) of the features as they are, unscaled, 0 where `used` (F,) is false.

    at_least (F,): lower bounds, 0 or -inf. The same input gives the same weights.
    """
    chosen = np.flatnonzero(used)
    bounds = [(bound, None) for bound in at_least[chosen]]

    def loss(scaled: F64) -> tuple[float, F64]:
        value, gradient = _negative_log_likelihood(questions, chosen, scaled / scales[chosen])
        return value + ridge / 2 * float(scaled @ scaled), gradient / scales[chosen] + ridge * scaled

    found = minimize(loss, np.zeros(len(chosen)), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500})
    weights = np.zeros(len(scales))
    weights[chosen] = found.x / scales[chosen]
    return weights


def _negative_log_likelihood(questions: Questions, chosen: npt.NDArray[np.int64], weights: F64) -> tuple[float, F64]:
    """The mean over questions, with its gradient (F of `chosen`,)."""
    num_questions = len(questions.targets)
    value, gradient = 0.0, np.zeros(len(chosen))
    narrow = weights.astype(np.float32)
    for begin in range(0, num_questions, _QUESTIONS_AT_ONCE):
        block = slice(begin, begin + _QUESTIONS_AT_ONCE)
        features, targets = questions.features[block][:, :, chosen], questions.targets[block]
        scores = np.where(questions.ranked[block], (features @ narrow).astype(np.float64), -np.inf)  # (q, C)
        top = scores.max(axis=1, keepdims=True)
        shares = np.exp(scores - top)
        total = shares.sum(axis=1, keepdims=True)
        rows = np.arange(len(targets))
        value += float((top[:, 0] + np.log(total[:, 0]) - scores[rows, targets]).sum())
        shares /= total
        expected = np.einsum("qc,qcf->f", shares.astype(np.float32), features, optimize=True)
        gradient += expected - features[rows, targets].sum(axis=0)
    return value / num_questions, gradient / num_questions
