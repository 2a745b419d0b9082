"""Bootstrap intervals: coverage on data whose mean is known, and agreement with the normal interval."""

import numpy as np
import pytest

from rec_dist.evaluation.bootstrap import Interval, bootstrap_interval, paired_difference


@pytest.mark.parametrize("draw", ["hits", "normal"])  # few distinct values or as many as users: the two ways to resample
def test_intervals_cover_the_true_mean_as_often_as_they_say(draw):
    rng = np.random.default_rng(0)
    trials, users = 400, 100
    samples = rng.random((trials, users)) < 0.3 if draw == "hits" else rng.normal(0.3, 2.0, (trials, users))
    covered = 0
    for seed, sample in enumerate(samples):
        interval = bootstrap_interval(sample, seed=seed, num_resamples=1000)
        covered += interval.low <= 0.3 <= interval.high
    # 0.95 +- 3 standard errors (0.011 each), and some more below, because the percentile interval is a little too narrow
    assert 0.90 <= covered / trials <= 0.98


@pytest.mark.parametrize("distinct", [True, False])
def test_both_ways_to_resample_give_the_normal_interval(distinct):
    rng = np.random.default_rng(1)
    values = rng.normal(5.0, 1.0, 2000) if distinct else rng.integers(0, 5, 2000) / 4
    interval = bootstrap_interval(values, seed=3, num_resamples=4000)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert interval.value == pytest.approx(values.mean(), rel=1e-12)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.12 * half)
    assert interval.n == 2000


def test_the_seed_decides():
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap_interval(values, seed=7) == bootstrap_interval(values, seed=7)
    assert bootstrap_interval(values, seed=7) != bootstrap_interval(values, seed=8)


def test_a_higher_level_is_wider():
    values = np.random.default_rng(3).normal(size=80)
    narrow, wide = (bootstrap_interval(values, seed=0, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_one_user_and_constant_values():
    assert bootstrap_interval([0.25], seed=0) == Interval(0.25, 0.25, 0.25, 1, 1)
    assert bootstrap_interval([0.5] * 30, seed=0) == Interval(0.5, 0.5, 0.5, 30, 30)


def test_a_paired_difference_is_narrower_than_the_two_runs():
    rng = np.random.default_rng(4)
    easy = rng.normal(size=300)  # both runs share what makes a user easy
    first, second = easy + rng.normal(0.1, 0.1, 300), easy + rng.normal(0.0, 0.1, 300)
    difference = paired_difference(first, second, seed=0)
    alone = bootstrap_interval(first, seed=0)
    assert difference.value == pytest.approx((first - second).mean())
    assert difference.low > 0
    assert difference.high - difference.low < 0.3 * (alone.high - alone.low)
    swapped = paired_difference(second, first, seed=0)
    assert swapped.value == -difference.value


def test_the_reported_form():
    known = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    assert Interval(0.5, 0.4, 0.6, 10, 10).to_dict() == known
    assert Interval(0.5, 0.4, 0.6, 10, 25).to_dict() == {**known, "questions": 25}


def test_users_are_drawn_with_all_their_questions_by_hand():
    # Resamples of users {0, 1}: 0 0 -> 2/2, 0 1 and 1 0 -> 2/3, 1 1 -> 0/1, with probabilities 1/4, 1/2, 1/4.
    values, users = [1.0, 0.0, 1.0], [7, 3, 7]
    wide = bootstrap_interval(values, seed=0, users=users)
    assert (wide.value, wide.low, wide.high) == (pytest.approx(2 / 3), 0.0, 1.0)
    assert (wide.n, wide.questions) == (2, 3)
    middle = bootstrap_interval(values, seed=0, users=users, level=0.4)  # the quantiles 0.3 and 0.7
    assert (middle.low, middle.high) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


@pytest.mark.parametrize("distinct", [True, False])
def test_intervals_over_users_cover_where_those_over_questions_do_not(distinct):
    rng = np.random.default_rng(5)
    covered = {"users": 0, "questions": 0}
    for seed in range(300):
        sizes = rng.integers(1, 12, 80)
        users = np.repeat(np.arange(80), sizes)
        level = rng.normal(0.3, 1.0, 80)[users]  # what the questions of a user share
        values = (level > 0.3).astype(float) if distinct else level + rng.normal(0.0, 0.3, len(users))
        truth = 0.5 if distinct else 0.3
        for name, owners in (("users", users), ("questions", None)):
            interval = bootstrap_interval(values, seed=seed, users=owners, num_resamples=500)
            covered[name] += interval.low <= truth <= interval.high
    assert 0.89 <= covered["users"] / 300 <= 0.985
    assert covered["questions"] / 300 < 0.75


def test_users_with_one_question_each_change_nothing():
    for values in (np.random.default_rng(6).integers(0, 4, 200) / 3, np.random.default_rng(7).normal(size=50)):
        plain = bootstrap_interval(values, seed=1)
        assert bootstrap_interval(values, seed=1, users=np.arange(len(values)) * 3) == plain


def test_a_paired_difference_is_over_users_too():
    rng = np.random.default_rng(8)
    users = np.repeat(np.arange(50), 8)
    gain = np.repeat(rng.normal(0.0, 1.0, 50), 8)
    first, second = rng.normal(size=400) + gain, rng.normal(size=400)
    over_users = paired_difference(first, second, seed=0, users=users)
    over_questions = paired_difference(first, second, seed=0)
    assert over_users.value == over_questions.value
    assert over_users.high - over_users.low > 1.5 * (over_questions.high - over_questions.low)
    assert (over_users.n, over_users.questions) == (50, 400)


@pytest.mark.parametrize("draw", ["hits", "normal"])
def test_intervals_over_users_and_seeds_cover_where_those_over_users_do_not(draw):
    """Each seed has an effect of its own on all users, which an interval of its mean over users cannot know."""
    rng = np.random.default_rng(9)
    trials, seeds, users = 300, 12, 60
    covered = {"both": 0, "users": 0}
    for trial in range(trials):
        of_seed = rng.normal(0.0, 0.1, (seeds, 1))
        chance = 0.5 + of_seed
        values = rng.random((seeds, users)) < chance if draw == "hits" else of_seed + 0.5 + rng.normal(0.0, 0.3, (seeds, users))
        both = bootstrap_interval(values, seed=trial, num_resamples=500)
        alone = bootstrap_interval(np.mean(values, axis=0), seed=trial, num_resamples=500)
        covered["both"] += both.low <= 0.5 <= both.high
        covered["users"] += alone.low <= 0.5 <= alone.high
        assert both.value == pytest.approx(alone.value)
        assert (both.n, both.questions, both.repeats) == (users, users, seeds)
    assert covered["both"] / trials >= 0.90
    assert covered["users"] / trials < 0.8


def test_seeds_are_drawn_by_hand():
    values = [[0.0], [3.0], [9.0]]  # one user, so only seeds vary; of the three, two are drawn
    found = bootstrap_interval(values, seed=0, num_resamples=20_000, level=1 - 2 * 0.2)
    # their means: 0 (1/9), 1.5 (2/9), 3 (1/9), 4.5 (2/9), 6 (2/9), 9 (1/9): the quantiles 0.2 and 0.8
    assert (found.value, found.low, found.high) == (4.0, 1.5, 6.0)
    assert found.to_dict() == {"value": 4.0, "low": 1.5, "high": 6.0, "n": 1, "repeats": 3}


def test_one_repeat_is_none():
    values = np.random.default_rng(10).normal(size=40)
    assert bootstrap_interval(values[None], seed=1) == bootstrap_interval(values, seed=1)


def test_repeats_are_paired_seed_by_seed():
    rng = np.random.default_rng(11)
    shared = rng.normal(0.0, 1.0, (3, 1)) + rng.normal(size=(3, 50))  # what both models of a seed have in common
    difference = paired_difference(shared + 0.2, shared, seed=0)
    assert (difference.low, difference.high) == (pytest.approx(0.2), pytest.approx(0.2))
    against_one = paired_difference(shared, np.zeros(50), seed=0)
    assert against_one == bootstrap_interval(shared, seed=0)
    with pytest.raises(ValueError, match="same users"):
        paired_difference(shared, shared[:2], seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([], seed=0), "at least 1 of each"),
        (lambda: bootstrap_interval([[[1.0]]], seed=0), "must have shape"),
        (lambda: bootstrap_interval([0.0, float("nan")], seed=0), "value of question 1 is not finite"),
        (lambda: bootstrap_interval([1.0], seed=0, num_resamples=0), "num_resamples"),
        (lambda: bootstrap_interval([1.0], seed=0, level=1.0), "level"),
        (lambda: paired_difference([1.0], [1.0, 2.0], seed=0), "same users"),
        (lambda: bootstrap_interval([1.0, 2.0], seed=0, users=[1]), "the user of each value"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
