"""From scores to metrics: ranks computed by hand, ties that count against the target, and any order of candidates."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rec_dist.evaluation import measure
from rec_dist.evaluation.baselines import Floats
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.measure import (
    SHORT_HISTORY,
    metrics_per_question,
    predictions_in_blocks,
    predictions_of,
    score_in_blocks,
    summarize,
    summarize_parts,
)
from rec_dist.runtime.arrays import I32

COUNTS = np.ones(100, dtype=np.int64)


def example(user: int, candidates: list[int], target: int) -> EvalExample:
    return EvalExample(user, 3, target, np.asarray([90, 91], dtype=np.int32), np.asarray(candidates, dtype=np.int32))


def ranks(examples: list[EvalExample], scores: list[list[float]]) -> list[int]:
    return predictions_of(examples, [np.asarray(row, dtype=np.float32) for row in scores], COUNTS).ranks.tolist()


@pytest.mark.parametrize(
    ("scores", "rank"),
    [
        ([5, 1, 2, 3], 1),
        ([2.5, 1, 2, 3], 2),
        ([0, 1, 2, 3], 4),
        ([3, 1, 2, 3], 2),
        ([1, 1, 1, 1], 4),
        ([-np.inf, -np.inf, 0, 0], 4),
    ],
)
def test_a_tie_counts_against_the_target(scores: list[float], rank: int) -> None:
    assert ranks([example(1, [7, 4, 5, 6], 7)], [scores]) == [rank]


def test_the_order_of_candidates_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    items, scores = rng.permutation(50)[:20], rng.normal(size=20)
    found = set()
    for _ in range(10):
        order = rng.permutation(20)
        found |= set(ranks([example(1, items[order].tolist(), int(items[4]))], [scores[order].tolist()]))
    assert found == {1 + int((scores > scores[4]).sum())}


def test_metrics_of_each_user_by_hand() -> None:
    asked = [example(1, [7, 4, 5, 6], 7), example(2, [4, 8, 5], 8), example(3, list(range(20)), 0)]
    scores = [[5.0, 1, 2, 3], [3.0, 2, 1], [float(i) for i in range(20)]]  # ranks 1 of 4, 2 of 3, 20 of 20
    found = metrics_per_question(predictions_of(asked, [np.asarray(row, dtype=np.float32) for row in scores], COUNTS))
    expected = {
        "hr@1": [1, 0, 0],
        "hr@5": [1, 1, 0],
        "hr@10": [1, 1, 0],
        "ndcg@5": [1, 1 / math.log2(3), 0],
        "ndcg@10": [1, 1 / math.log2(3), 0],
        "mrr": [1, 1 / 2, 1 / 20],
        "auc": [1, 1 / 2, 0],
    }
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values), name


def test_a_summary_is_the_mean_over_users_inside_its_interval() -> None:
    asked = [example(user, [7, 4], 7) for user in range(100)]
    scores = [np.asarray([1.0, 0.0 if user < 70 else 2.0], dtype=np.float32) for user in range(100)]
    found = summarize(predictions_of(asked, scores, COUNTS), seed=0)
    hit = found["hr@1"]
    assert hit["value"] == pytest.approx(0.7)
    assert hit["n"] == 100
    assert 0.58 < hit["low"] < 0.66 < 0.74 < hit["high"] < 0.82  # 1.96 * sqrt(.7 * .3 / 100) = 0.09
    assert found["mrr"]["value"] == pytest.approx(0.85)
    assert summarize(predictions_of(asked, scores, COUNTS), seed=0) == found


def test_scores_must_come_for_every_example() -> None:
    with pytest.raises(ValueError, match="zip"):
        predictions_of([example(1, [7, 4], 7)], [], COUNTS)


class Counted:
    """Scores -item, and notes how many candidates each call had."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        self.calls.append(sum(len(items) for items in candidates))
        return [-items.astype(np.float64) for items in candidates]


def test_blocks_of_scores_are_made_one_after_another_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 7 scores a block, but an example is never cut. A block is scored when the one before it has been taken."""
    monkeypatch.setattr(measure, "_MOST_SCORES", 7)
    sizes = [3, 4, 1, 9, 2, 2, 2, 2]
    asked = [example(user, list(range(size)), size - 1) for user, size in enumerate(sizes)]
    scorer, found = Counted(), []
    for number, block in enumerate(predictions_in_blocks(asked, score_in_blocks(scorer, asked), COUNTS), start=1):
        found.append(block)
        assert len(scorer.calls) == number
    assert scorer.calls == [7, 1, 9, 6, 2]
    whole = predictions_of(asked, Counted().score([e.history for e in asked], [e.candidates for e in asked]), COUNTS)
    assert np.concatenate([block.ranks for block in found]).tolist() == whole.ranks.tolist() == sizes
    assert [row.tolist() for block in found for row in block.scores] == [row.tolist() for row in whole.scores]
    with pytest.raises(AssertionError, match="more scores"):
        list(predictions_in_blocks(asked[:1], [np.zeros(3), np.zeros(4)], COUNTS))


def test_parts_by_hand() -> None:
    """Item 8 is cold; users 2 and 3 have short histories. A user with two questions is one cluster of its part."""
    asked = [example(user, [7, 4, 5, 8], target) for user, target in ((1, 7), (1, 8), (2, 8), (3, 7))]
    long = np.arange(20, 20 + SHORT_HISTORY + 1, dtype=np.int32)
    asked = [replace(one, history=long) if one.user_id == 1 else replace(one, history=long[:SHORT_HISTORY]) for one in asked]
    counts = COUNTS.copy()
    counts[8] = 0
    scores = [np.asarray(row, dtype=np.float32) for row in ([4, 1, 2, 3], [4, 1, 2, 3], [1, 2, 3, 9], [1, 2, 3, 4])]
    predictions = predictions_of(asked, scores, counts)  # ranks 1, 2, 1, 4
    assert predictions.train_counts.tolist() == [1, 0, 0, 1]
    parts = summarize_parts(predictions, seed=0)
    values = {part: metrics["ndcg@5"]["value"] for part, metrics in parts.items()}
    gain = [1, 1 / math.log2(3), 1, 1 / math.log2(5)]
    expected = {"cold": (gain[1] + gain[2]) / 2, "warm": (gain[0] + gain[3]) / 2, "short history": (gain[2] + gain[3]) / 2}
    assert values == pytest.approx(expected)
    assert parts["cold"]["hr@1"]["n"] == 2 and set(parts["cold"]) == set(summarize(predictions, seed=0))
    assert list(summarize_parts(predictions, seed=0, values={"mrr": metrics_per_question(predictions)["mrr"]})["warm"]) == ["mrr"]


def test_a_part_without_a_question_or_with_all_is_left_out() -> None:
    assert summarize_parts(predictions_of([example(1, [7, 4], 7)], [np.asarray([1.0, 0.0])], COUNTS), seed=0) == {}
