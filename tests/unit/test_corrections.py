"""Corrections of scores: the formula, and the choice on validation questions."""

import numpy as np
import pytest

from rec_dist.config.evaluate import EvaluateConfig
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.language_model.corrections import Correction, Titles, choose, fixed

TITLES = Titles(np.asarray([-1.0, -4.0, -9.0], dtype=np.float32), np.asarray([1, 2, 4]))


def test_the_formula() -> None:
    items = np.asarray([2, 0], dtype=np.int32)
    corrected = Correction(0.5, 1.0).apply(np.asarray([-6.0, -2.0], dtype=np.float32), items, TITLES)
    assert corrected.tolist() == [(-6 + 4.5) / 4, (-2 + 0.5) / 1]


def test_the_best_pair_on_validation_questions_is_taken_and_the_smallest_of_equal_ones() -> None:
    """Item 2 is chosen, and its long unlikely title hides it: only with all of the prior taken off it leads."""
    history, items = np.asarray([9], dtype=np.int32), np.arange(3, dtype=np.int32)
    examples = [EvalExample(user, 1, 2, history, items) for user in range(3)]
    scores = [np.asarray([-1.0, -4.0, -8.5])] * 3  # less the whole prior: 0, 0, 0.5
    both = EvaluateConfig(title_prior="valid", length_power="valid")
    assert choose(both, examples, scores, TITLES) == Correction(1.0, 0.0)
    assert choose(EvaluateConfig(title_prior="valid", length_power=1.0), examples, scores, TITLES) == Correction(1.0, 1.0)
    first = [EvalExample(0, 1, 0, history, items)]
    assert choose(both, first, scores[:1], TITLES) == Correction(0.0, 0.0)


@pytest.mark.parametrize(("prior", "power", "has"), [(0.0, 0.0, False), (0.0, "valid", True), (1.0, 0.0, True)])
def test_what_is_wanted(prior: float, power: float | str, has: bool) -> None:
    settings = EvaluateConfig(title_prior=prior, length_power=power)
    assert settings.corrects is has
    assert (fixed(settings) is None) is (power == "valid")
