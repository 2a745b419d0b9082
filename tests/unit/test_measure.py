"""From scores to metrics: ranks computed by hand, ties that count against the target, and any order of candidates."""

import itertools
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared_rows import Row, write_prepared

from rec_dist.data.artifacts.predictions import Predictions, writing_predictions
from rec_dist.evaluation import measure
from rec_dist.evaluation.baselines import Floats, PopularityScorer
from rec_dist.evaluation.examples import EvalExample, build_eval_examples
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


@pytest.mark.parametrize("most", [1, 7, 40, 10_000])
def test_scores_of_any_block_make_the_same_file(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores may be made in other blocks than those in which rows are written."""
    rng = np.random.default_rng(0)
    asked = [example(user, list(range(size)), size - 1) for user, size in enumerate(rng.integers(2, 30, 50).tolist())]
    own = [-e.candidates.astype(np.float64) for e in asked]
    for name, scores in (("held", own), ("made", score_in_blocks(Counted(), asked))):
        with writing_predictions(tmp_path / name) as add:
            given = iter(scores)
            monkeypatch.setattr(measure, "_MOST_SCORES", most)
            first = next(given)  # the blocks of scores begin here
            monkeypatch.undo()
            for block in predictions_in_blocks(asked, itertools.chain([first], given), COUNTS):
                add(block)
    assert (tmp_path / "held").read_bytes() == (tmp_path / "made").read_bytes()


def test_memory_does_not_grow_with_questions_times_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions of a split, made, scored and written: a matrix of all scores alone would take 16 MB."""
    num_items, num_users = 1_000, 2_000
    monkeypatch.setattr(measure, "_MOST_SCORES", 20_000)
    rng = np.random.default_rng(0)
    rows = [Row(user, rng.integers(0, num_items, 6).tolist(), 5) for user in range(num_users)]
    data = write_prepared(tmp_path / "data", {"test": rows}, [f"Film {item}" for item in range(num_items)])
    scorer, path = PopularityScorer(np.arange(num_items, dtype=np.int64)), tmp_path / "predictions.arrow"
    tracemalloc.start()
    examples = build_eval_examples(data, split="test", num_candidates="all", max_users=None, seed=0)
    with writing_predictions(path) as add:
        for block in predictions_in_blocks(examples, score_in_blocks(scorer, examples), data.train_counts):
            add(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(Predictions.read(path).ranks) == num_users
    assert peak < 3e6


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
    wanted = {"mrr": metrics_per_question(predictions)["mrr"]}
    assert list(summarize_parts(predictions, seed=0, values=wanted)["warm"]) == ["mrr"]


def test_a_part_without_a_question_or_with_all_is_left_out() -> None:
    assert summarize_parts(predictions_of([example(1, [7, 4], 7)], [np.asarray([1.0, 0.0])], COUNTS), seed=0) == {}


def test_scores_are_read_to_their_end_also_without_asserts() -> None:
    """What an ensemble costs and what its members add is known only then."""
    without: dict[str, Any] = {"__name__": "without_asserts"}
    exec(compile(Path(measure.__file__).read_text(encoding="utf-8"), measure.__file__, "exec", optimize=1), without)
    ended = []

    def scores() -> Iterator[Floats]:
        yield np.asarray([1.0, 0.0])
        ended.append(True)

    list(without["predictions_in_blocks"]([example(1, [7, 4], 7)], scores(), COUNTS))
    assert ended
