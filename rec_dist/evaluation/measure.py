"""Turns scores into ranks, metrics of each question, and intervals over users."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from rec_dist.data.artifacts.predictions import Predictions
from rec_dist.evaluation.baselines import CandidateScorer, Floats
from rec_dist.evaluation.bootstrap import bootstrap_interval
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.metrics import ranking_metrics, target_ranks
from rec_dist.runtime.arrays import I32, I64

CUTOFFS = (1, 5, 10)
OF_ALL_RANKS = ("mrr", "auc")  # metrics that need the rank of a target wherever it is
SHORT_HISTORY = 5  # items: as few as the k-core of most data sets leaves
_MOST_EXAMPLES, _MOST_SCORES = 4096, 1 << 22  # of a block: 32 MiB of float64


def blocks_of(examples: Iterable[EvalExample]) -> Iterator[list[EvalExample]]:
    """The examples in blocks whose scores are few enough to be in memory together."""
    block: list[EvalExample] = []
    size = 0
    for example in examples:
        if block and (size + len(example.candidates) > _MOST_SCORES or len(block) == _MOST_EXAMPLES):
            yield block
            block, size = [], 0
        block.append(example)
        size += len(example.candidates)
    if block:
        yield block


def score_in_blocks(scorer: CandidateScorer, examples: Iterable[EvalExample]) -> Iterator[Floats]:
    """The scores of each example's candidates, (C,) each, made when they are asked for."""
    for block in blocks_of(examples):
        yield from scorer.score([example.history for example in block], [example.candidates for example in block])


def predictions_in_blocks(
    examples: Iterable[EvalExample], scores: Iterable[npt.NDArray[np.floating[Any]]], train_counts: I64
) -> Iterator[Predictions]:
    """predictions_of, block by block: it asks for the scores of a block when the one before has been taken."""
    given = iter(scores)
    for block in blocks_of(examples):
        yield predictions_of(block, list(islice(given, len(block))), train_counts)
    left = next(given, None)  # not in the assert, which `python -O` drops: what makes scores ends when it is asked once more
    assert left is None, "more scores than examples"


def ranks_of(examples: Sequence[EvalExample], scores: Sequence[npt.NDArray[np.floating[Any]]]) -> I32:
    """(N,): the rank of each target among its candidates, from 1; ties count against it. scores[n] (C_n,): as the candidates."""
    ranks = []
    for example, values in zip(examples, scores, strict=True):
        place = int(np.flatnonzero(example.candidates == example.target)[0])
        ranks.append(int(target_ranks(values[None].astype(np.float64), target=place)[0]))
    return np.asarray(ranks, dtype=np.int32)


def predictions_of(
    examples: Sequence[EvalExample], scores: Sequence[npt.NDArray[np.floating[Any]]], train_counts: I64
) -> Predictions:
    """What is kept of each question. scores: as in ranks_of.

    train_counts (I,): how often each item occurs in the train split.
    """
    kept = [values.astype(np.float32) for values in scores]
    return _rows(examples, ranks_of(examples, scores), kept, train_counts, None)


def _rows(
    examples: Sequence[EvalExample],
    ranks: I32,
    scores: Sequence[npt.NDArray[np.float32]],
    train_counts: I64,
    limit: int | None,
) -> Predictions:
    targets = np.asarray([e.target for e in examples], dtype=np.int32)
    return Predictions(
        user_ids=np.asarray([e.user_id for e in examples], dtype=np.int64),
        positions=np.asarray([e.position for e in examples], dtype=np.int32),
        targets=targets,
        ranks=ranks,
        history_lengths=np.asarray([len(e.history) for e in examples], dtype=np.int32),
        train_counts=train_counts[targets],
        candidates=[e.candidates for e in examples],
        scores=scores,
        rank_limit=limit,
    )


def ranked_in_blocks(
    examples: Iterable[EvalExample], ranks: Iterable[int | None], train_counts: I64, *, limit: int
) -> Iterator[Predictions]:
    """predictions_in_blocks for ranks that are known up to a limit, None beyond it, without scores."""
    given = iter(ranks)
    for block in blocks_of(examples):
        found = [limit + 1 if rank is None else rank for rank in islice(given, len(block))]
        yield _rows(block, np.asarray(found, dtype=np.int32), [np.empty(0, dtype=np.float32)] * len(block), train_counts, limit)


def metrics_per_question(predictions: Predictions) -> dict[str, npt.NDArray[np.float64]]:
    """hr@K, ndcg@K, mrr and auc of every question, by name: (N,) each. Without the latter two if ranks have a limit."""
    assert predictions.rank_limit is None or predictions.rank_limit >= max(CUTOFFS)
    sizes = np.asarray([len(candidates) for candidates in predictions.candidates])
    metrics = ranking_metrics(predictions.ranks, sizes, CUTOFFS)
    return {name: each for name, each in metrics.items() if predictions.rank_limit is None or name not in OF_ALL_RANKS}


def metric_names() -> tuple[str, ...]:
    """The names of the metrics that metrics_per_question returns."""
    one = np.ones(1, dtype=np.int64)
    return tuple(ranking_metrics(one, one + 1, CUTOFFS))


def summarize(predictions: Predictions, *, seed: int) -> dict[str, dict[str, Any]]:
    """The mean of each metric over questions with its 95 % interval over users: Interval.to_dict() of each."""
    return _intervals(metrics_per_question(predictions), predictions.user_ids, seed)


def metrics_of_repeats(repeats: Sequence[Predictions]) -> dict[str, npt.NDArray[np.float64]]:
    """metrics_per_question of each of S repeats of the same questions: (S, N) each, or (N,) of one."""
    each = [metrics_per_question(predictions) for predictions in repeats]
    return each[0] if len(each) == 1 else {name: np.stack([values[name] for values in each]) for name in each[0]}


def summarize_parts(
    predictions: Predictions, *, seed: int, values: dict[str, npt.NDArray[np.float64]] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """As summarize(), of the questions in each part: {part: {metric: interval}}.

    values: the metrics of its questions as metrics_of_repeats() gives them; None for all metrics of `predictions`.

    cold: the target never occurs in the train split; warm: it does; short history: at most SHORT_HISTORY items come before it. A
    part that holds no question, or all of them, is left out.
    """
    wanted = metrics_per_question(predictions) if values is None else values
    cold = predictions.train_counts == 0
    parts = {"cold": cold, "warm": ~cold, "short history": predictions.history_lengths <= SHORT_HISTORY}
    return {
        part: _intervals({name: each[..., chosen] for name, each in wanted.items()}, predictions.user_ids[chosen], seed)
        for part, chosen in parts.items()
        if 0 < chosen.sum() < len(chosen)
    }


def _intervals(values: dict[str, npt.NDArray[np.float64]], users: I64, seed: int) -> dict[str, dict[str, Any]]:
    return {name: bootstrap_interval(each, seed=seed, users=users).to_dict() for name, each in values.items()}
