"""Compares ranks and metrics with a plain loop and with numbers computed by hand."""

import doctest
import math

import numpy as np
import pytest

import rec_dist.evaluation.bootstrap
import rec_dist.evaluation.metrics
from rec_dist.errors import NotFiniteError
from rec_dist.evaluation.metrics import auc, group_ranks, hit_rate, ndcg, ranking_metrics, reciprocal_rank, target_ranks


@pytest.mark.parametrize("module", [rec_dist.evaluation.metrics, rec_dist.evaluation.bootstrap])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted >= 2
    assert result.failed == 0


def naive_rank(scores, target):
    others = [score for index, score in enumerate(scores) if index != target]
    return 1 + sum(score >= scores[target] for score in others)


def test_ranks_are_the_loops():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=(200, 9)).astype(np.float32)  # few values give many ties
    target = rng.integers(0, 9, size=200)
    expected = [naive_rank(row.tolist(), t) for row, t in zip(scores, target, strict=True)]
    assert target_ranks(scores, target).tolist() == expected
    assert target_ranks(scores).tolist() == [naive_rank(row.tolist(), 0) for row in scores]


def test_ragged_groups_are_the_tables_rows():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 8, size=50)
    offsets = np.concatenate([[0], sizes.cumsum()])
    scores = rng.integers(0, 5, size=offsets[-1]).astype(np.float64)
    expected = [int(target_ranks(part[None])[0]) for part in np.split(scores, offsets[1:-1])]
    assert group_ranks(scores, offsets).tolist() == expected
    assert len(set(expected)) > 3
    assert group_ranks([], [0]).tolist() == []


def test_a_constant_scorer_gets_no_credit():
    ranks = target_ranks(np.zeros((4, 20)))
    assert ranks.tolist() == [20] * 4
    metrics = ranking_metrics(ranks, 20, [1, 10])
    assert metrics["hr@10"].sum() == metrics["ndcg@10"].sum() == metrics["auc"].sum() == 0
    assert metrics["mrr"].tolist() == [0.05] * 4


def test_minus_infinity_pads():
    assert target_ranks([[-3.0, -4.0, -math.inf, -math.inf]]).tolist() == [1]


def test_metrics_by_hand():
    ranks = np.array([1, 2, 5, 20])
    assert hit_rate(ranks, 5).tolist() == [1, 1, 1, 0]
    assert hit_rate(ranks, 4).tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(ndcg(ranks, 5), [1, 1 / math.log2(3), 1 / math.log2(6), 0], rtol=1e-15)
    np.testing.assert_allclose(reciprocal_rank(ranks), [1, 0.5, 0.2, 0.05], rtol=1e-15)
    np.testing.assert_allclose(auc(ranks, 20), [1, 18 / 19, 15 / 19, 0], rtol=1e-15)
    np.testing.assert_allclose(auc([2, 1], [2, 5]), [0, 1])


def test_random_scores_give_the_expected_means():
    ranks = target_ranks(np.random.default_rng(2).random((20_000, 20)))
    metrics = {name: value.mean() for name, value in ranking_metrics(ranks, 20, [1, 5]).items()}
    assert list(metrics) == ["hr@1", "ndcg@1", "hr@5", "ndcg@5", "mrr", "auc"]
    assert metrics["hr@5"] == pytest.approx(0.25, abs=0.01)
    assert metrics["auc"] == pytest.approx(0.5, abs=0.01)
    assert metrics["mrr"] == pytest.approx(sum(1 / r for r in range(1, 21)) / 20, abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: target_ranks([0.0, 1.0]), "must have shape"),
        (lambda: target_ranks(np.zeros((2, 0))), "at least 1 candidate"),
        (lambda: target_ranks([[0.0, 1.0]], [2]), "target must lie in 0..1"),
        (lambda: target_ranks([[0.0, 1.0]], [-1]), "target must lie in 0..1"),
        (lambda: target_ranks([[0.0, 1.0]], [0, 1]), "target must be one index"),
        (lambda: group_ranks([1.0], [0, 0, 1]), "group 0 has no candidate"),
        (lambda: group_ranks([1.0, 2.0], [0, 1]), "must run from 0"),
        (lambda: hit_rate([0], 1), "ranks must be integers from 1"),
        (lambda: hit_rate([1.5], 1), "ranks must be integers from 1"),
        (lambda: ndcg([1], 0), "at least 1"),
        (lambda: auc([1], 1), "at least 2 candidates"),
        (lambda: auc([3], 2), "rank 3 is larger than"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_score_that_is_no_number_has_no_rank() -> None:
    for call in (lambda: target_ranks([[0.0, 1.0], [0.0, math.nan]]), lambda: group_ranks([0.0, math.nan], [0, 2])):
        with pytest.raises(NotFiniteError, match="NaN"):
            call()
