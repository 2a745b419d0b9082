"""Neighbours: the tables by hand, the score by its formula, and the run through train and evaluate."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_rows import Row, write_prepared
from scipy import sparse
from small_recommenders import config as small_config

import rec_dist
from rec_dist.errors import UserError
from rec_dist.methods.neighbours.config import NeighboursConfig
from rec_dist.methods.neighbours.scorer import NeighboursScorer
from rec_dist.methods.neighbours.tables import NeighbourTables, _largest, fit_tables, similar_titles

TITLES = ["Red Lamp", "Red Lamp Shade", "Blue Pen", "Pen Refill", "Anvil"]


def _tf_idf(titles: list[str]) -> np.ndarray:
    """Textbook TF-IDF with sublinear term counts and smoothed document counts, rows of length 1."""
    words = sorted({word for title in titles for word in title.lower().split()})
    rows = []
    for title in titles:
        mine = title.lower().split()
        row = []
        for word in words:
            count = mine.count(word)
            holding = sum(word in other.lower().split() for other in titles)
            row.append((1 + math.log(count)) * (1 + math.log((1 + len(titles)) / (1 + holding))) if count else 0.0)
        rows.append(row)
    matrix = np.asarray(rows)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def test_titles_are_compared_by_the_cosine_of_their_tf_idf():
    vectors = _tf_idf(TITLES)
    expected = vectors @ vectors.T
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(similar_titles(TITLES, top_k=10).toarray(), expected, atol=1e-6)


def test_only_the_largest_are_kept_and_equal_values_keep_the_smaller_columns():
    table = sparse.csr_array(np.asarray([[0, 2, 3, 2, 2], [0, 0, 0, 0, 0], [5, 1, 0, 0, -1]], dtype=np.float32))
    kept = _largest(table, 2).toarray()
    assert kept.tolist() == [[0, 2, 3, 0, 0], [0, 0, 0, 0, 0], [5, 1, 0, 0, 0]]


def test_next_items_are_counted_within_a_sequence_only(tmp_path: Path):
    rows = {"train": [Row(0, [0, 1, 2]), Row(1, [3, 1, 2]), Row(2, [4])]}
    tables = fit_tables(write_prepared(tmp_path / "data", rows, TITLES), top_k=5)
    expected = np.zeros((5, 5))
    expected[0, 1] = expected[3, 1] = 1
    expected[1, 2] = 2
    np.testing.assert_array_equal(tables.following.toarray(), expected)
    np.testing.assert_allclose(tables.popularity, np.log1p([1, 2, 2, 1, 1]))


def test_of_a_validation_split_targets_alone_count(tmp_path: Path):
    rows = {"train": [Row(0, [0, 1])], "valid": [Row(0, [0, 1, 2, 4], first_target=2)]}
    tables = fit_tables(write_prepared(tmp_path / "data", rows, TITLES), top_k=5, splits=("train", "valid"))
    expected = np.zeros((5, 5))
    expected[0, 1] = expected[1, 2] = expected[2, 4] = 1
    np.testing.assert_array_equal(tables.following.toarray(), expected)
    np.testing.assert_allclose(tables.popularity, np.log1p([1, 1, 1, 0, 1]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=6), st.floats(0.1, 1.0))
def test_the_score_is_the_formula(history: list[int], decay: float):
    rng = np.random.default_rng(0)
    title, following = (sparse.csr_array(np.round(rng.random((5, 5)) * 3).astype(np.float32)) for _ in range(2))
    popularity = rng.random(5).astype(np.float32)
    keys = NeighboursConfig(decay=decay, max_history=4, title_weight=0.7, next_weight=1.3, popularity_weight=0.2)
    expected = 0.2 * popularity.astype(np.float64)
    for age, item in enumerate(reversed(history[-4:])):
        expected += decay**age * (0.7 * title.toarray()[item] + 1.3 * np.log1p(following.toarray()[item]))
    scorer = NeighboursScorer(NeighbourTables(title, following, popularity), keys)
    candidates = np.asarray([3, 0, 4], dtype=np.int32)
    (got,) = scorer.score([np.asarray(history, dtype=np.int32)], [candidates])
    np.testing.assert_allclose(got, expected[candidates], rtol=1e-5, atol=1e-6)


def _keys(folder: Path, **more: object) -> dict:
    value = small_config(folder, cycle=23).model_dump(exclude_unset=True)
    return {**value, "task": {"kind": "neighbours", **more}, "cluster": {"launcher": "local"}}


def test_a_run_is_trained_evaluated_and_kept(tmp_path: Path):
    keys = _keys(tmp_path)
    run = rec_dist.train(keys)
    assert run.finished and (run.model_path / "neighbours.safetensors").is_file()
    written = (run.model_path / "neighbours.safetensors").stat().st_mtime_ns
    again = rec_dist.train(keys)
    assert (again.model_path / "neighbours.safetensors").stat().st_mtime_ns == written
    # in this data set item (i + 1) % 23 always follows item i, and no title says anything
    assert rec_dist.evaluate(run, ["evaluate.num_candidates=all"])["hr@1"]["value"] == 1.0


def test_damage_is_told(tmp_path: Path):
    run = rec_dist.train(_keys(tmp_path))
    path = run.model_path / "neighbours.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"neighbours\.safetensors"):
        rec_dist.evaluate(run, ["evaluate.num_candidates=all"])


def test_a_fitted_method_is_not_profiled(tmp_path: Path):
    from rec_dist.config.load import load_config
    from rec_dist.methods.registry import build_task, find_initial_weights

    config = load_config(_keys(tmp_path))
    with pytest.raises(UserError, match="fitted at once"):
        build_task(config, find_initial_weights(config), "cpu")
