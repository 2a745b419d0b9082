"""Neighbours: the tables by hand, the score by its formula, and the run through train and evaluate."""

import json
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
from rec_dist.config.load import load_config
from rec_dist.data.artifacts.embeddings import PartFiles
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.errors import UserError
from rec_dist.methods.neighbours.config import NeighboursConfig
from rec_dist.methods.neighbours.method import NEIGHBOURS
from rec_dist.methods.neighbours.scorer import NeighboursScorer
from rec_dist.methods.neighbours.tables import NeighbourTables, _largest, fit_tables, similar_titles, similar_vectors

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
    keys = NeighboursConfig(
        decay=decay, max_history=4, title_weight=0.7, next_weight=1.3, embedding_weight=0.4, popularity_weight=0.2
    )
    embedding = sparse.csr_array(np.round(rng.random((5, 5)) * 3).astype(np.float32)) if decay > 0.5 else None
    expected = 0.2 * popularity.astype(np.float64)
    for age, item in enumerate(reversed(history[-4:])):
        expected += decay**age * (0.7 * title.toarray()[item] + 1.3 * np.log1p(following.toarray()[item]))
        expected += 0 if embedding is None else decay**age * 0.4 * embedding.toarray()[item]
    scorer = NeighboursScorer(NeighbourTables(title, following, popularity, embedding), keys)
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


def test_vectors_are_compared_by_their_cosine_after_whitening():
    rng = np.random.default_rng(3)
    values = (rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 9).astype(np.float32)
    centred = values - values.mean(0, dtype=np.float64)
    _, variances, directions = np.linalg.svd(centred, full_matrices=False)
    z = centred @ directions[:4].T / variances[:4]  # up to one scale, which a cosine does not see
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    expected = z @ z.T
    np.fill_diagonal(expected, 0)
    found = similar_vectors([values[:11], values[11:]], 4, top_k=7).toarray()
    for own, wanted in zip(found, expected, strict=True):
        best = np.argsort(-wanted)[:7]
        assert set(np.flatnonzero(own)) == set(best[wanted[best] > 0])
        np.testing.assert_allclose(own[own > 0], wanted[own > 0], atol=1e-5)


def _embedded(folder: Path, fingerprint: str) -> Path:
    """Vectors as `rec-dist embed` writes them, in which item i + 2 is the nearest of item i."""
    angles = np.arange(23) * 2 * np.pi / 23
    vectors = np.stack([np.cos(12 * angles), np.sin(12 * angles)], axis=1).astype(np.float32)
    files = PartFiles(folder, "key", [0, 23])
    files.write(0, vectors)
    files.join({"inputs": {"data": fingerprint}})
    return folder


def test_vectors_of_a_model_are_a_part_of_their_own(tmp_path: Path):
    keys = _keys(tmp_path)
    data = open_data(load_config(keys).data)
    folder = _embedded(tmp_path / "items", data.manifest.fingerprint)
    alone = {"embeddings": str(folder), "embedding_width": 2, "title_weight": 0.0, "next_weight": 0.0, "popularity_weight": 0.0}
    run = rec_dist.train({**keys, "task": {"kind": "neighbours", "neighbours": alone}})
    settings = json.loads((run.model_path / "neighbours.json").read_text(encoding="utf-8"))["settings"]
    assert "embeddings" not in settings, "the model does not depend on where its vectors lay"
    scorer = NEIGHBOURS.ranker.load(run.model_path, "cpu")
    candidates = np.arange(23)
    history = np.asarray([5], dtype=np.int32)
    assert list(scorer.score_parts([history], [candidates])) == ["embedding"]
    (scores,) = scorer.score([history], [candidates])
    assert set(np.argsort(-scores)[:2]) == {3, 7} and scores[5] == 0
    stranger = _embedded(tmp_path / "others", "another")
    faults: list[tuple[dict, str]] = [
        ({**alone, "embedding_width": 9}, r"task\.neighbours\.embedding_width \(9\) is more than the 2 directions"),
        ({"title_weight": 0.0, "next_weight": 0.0}, "no item has a neighbour"),
        ({**alone, "embeddings": str(stranger)}, "made from another data set"),
        ({**alone, "embeddings": str(tmp_path / "nowhere")}, "holds no item embeddings"),
    ]
    for number, (settings, words) in enumerate(faults):
        run_dir = tmp_path / f"fault{number}"
        with pytest.raises(UserError, match=words):
            rec_dist.train({**keys, "task": {"kind": "neighbours", "neighbours": settings}, "train": {"run_dir": str(run_dir)}})
        assert not run_dir.exists()


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
