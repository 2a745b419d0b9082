"""Scorers of candidates: scores by hand, batching that changes nothing, and ties that earn no credit."""

import numpy as np
import pytest
import torch

from rec_dist.evaluation.baselines import PopularityScorer
from rec_dist.evaluation.metrics import target_ranks
from rec_dist.methods.sequential import scorer as scorers
from rec_dist.methods.sequential.next_item import last_scores
from rec_dist.methods.sequential.sasrec import SASRec, SASRecShape
from rec_dist.methods.sequential.scorer import SequentialScorer
from rec_dist.methods.sequential.sequences import history_batch


def i32(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


@pytest.fixture
def model() -> SASRec:
    torch.manual_seed(0)
    return SASRec(SASRecShape(num_items=20, width=8, num_layers=1, num_heads=1, dropout=0.5, max_length=6))


def test_popularity_is_the_training_count():
    ranker = PopularityScorer(np.asarray([5, 0, 7, 5]))
    scores = ranker.score([i32(1), i32(2, 3)], [i32(3, 0, 1), i32(2)])
    assert [values.tolist() for values in scores] == [[5.0, 5.0, 0.0], [7.0]]


def test_equally_popular_candidates_stay_tied_and_rank_last():
    scores = PopularityScorer(np.full(4, 3)).score([i32(0)], [i32(1, 2, 3)])
    assert target_ranks(scores[0][None], target=0).tolist() == [3]


def test_sequential_scores_are_log_probabilities_of_the_whole_catalogue(model):
    everything = np.arange(20, dtype=np.int32)
    (scores,) = SequentialScorer(model).score([i32(4, 1, 9)], [everything])
    assert np.exp(scores).sum() == pytest.approx(1.0, abs=1e-12)
    truth = last_scores(model.eval(), history_batch([i32(4, 1, 9)], 6))[0].double().log_softmax(-1)
    assert scores == pytest.approx(truth.detach().numpy(), abs=1e-12)


def test_a_score_depends_on_neither_the_other_candidates_nor_their_order(model):
    ranker, history = SequentialScorer(model), i32(4, 1, 9)
    (pair,), (more,) = ranker.score([history], [i32(7, 2)]), ranker.score([history], [i32(2, 11, 3, 7)])
    assert pair.tolist() == [more[3], more[0]]


def test_batches_change_no_score(model, monkeypatch):
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 20, rng.integers(1, 9)).astype(np.int32) for _ in range(23)]
    candidates = [rng.permutation(20)[: rng.integers(1, 20)].astype(np.int32) for _ in range(23)]
    ranker = SequentialScorer(model)
    at_once = ranker.score(histories, candidates)
    monkeypatch.setattr(scorers, "_LOGITS_AT_ONCE", 3 * 20)
    in_threes = ranker.score(histories, candidates)
    assert [len(values) for values in in_threes] == [len(items) for items in candidates]
    for first, second in zip(at_once, in_threes, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-6)


def test_dropout_is_off_and_no_graph_is_kept(model):
    ranker = SequentialScorer(model.train())
    first, second = (ranker.score([i32(1, 2)], [i32(5, 6)])[0] for _ in range(2))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("kind", ["sequential", "popularity"])
def test_one_list_of_candidates_a_history(model, kind):
    ranker = SequentialScorer(model) if kind == "sequential" else PopularityScorer(np.ones(20, dtype=np.int64))
    assert ranker.score([], []) == []
    with pytest.raises(ValueError, match="2 histories and 1 lists"):
        ranker.score([i32(1), i32(2)], [i32(1)])


def test_an_empty_history_is_refused(model):
    with pytest.raises(ValueError, match="is empty"):
        SequentialScorer(model).score([i32(1), i32()], [i32(1), i32(2)])


def test_a_shared_array_of_candidates_gives_the_scores_of_separate_ones(model: SASRec) -> None:
    """`rank` gives every user the same array: the whole catalogue, or a part of it."""
    scorer, histories = SequentialScorer(model), [i32(1, 2), i32(3), i32(4, 5, 6)]
    for items in (np.arange(20, dtype=np.int32), i32(7, 3, 19)):
        together = scorer.score(histories, [items] * 3)
        apart = scorer.score(histories, [items.copy() for _ in histories])
        assert all(np.array_equal(one, other) for one, other in zip(together, apart, strict=True))
