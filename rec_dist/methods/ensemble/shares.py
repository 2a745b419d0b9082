"""The scores of an ensemble's evaluation, and what each member adds to them, by ranks without it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from rec_dist.evaluation.baselines import Floats
from rec_dist.evaluation.bootstrap import bootstrap_interval, paired_difference
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.metrics import hit_rate, ndcg, target_ranks
from rec_dist.methods.ensemble.members import FeatureBlock
from rec_dist.methods.ensemble.rerank import Reading
from rec_dist.methods.ensemble.saved_model import EnsembleWeights
from rec_dist.methods.method import Evaluation

_CUTOFF = 10


def scores_and_shares(
    learnt: EnsembleWeights,
    blocks: Iterator[FeatureBlock],
    read: Reading | None,
    evaluation: Evaluation,
    cost: dict[str, Any],
) -> Iterator[Floats]:
    """The scores, and then the values of EnsembleRanker.score in `cost`. A few numbers of each question are held."""
    users: list[int] = []
    ranks: list[npt.NDArray[np.int64]] = []  # (M + 1,) of each question
    found: list[Floats] = []
    rows = np.concatenate([learnt.weights[None], learnt.without])  # (M + 1, F)
    for block, features in blocks:
        if read is not None:
            found.append(read.found(len(users), block))
        for place, example in enumerate(block):
            values = np.stack([features[name][place] for name in learnt.features], axis=1)  # (C, F)
            variants = values @ rows.T  # (C, M + 1)
            users.append(example.user_id)
            ranks.append(_ranks(variants, example))
            yield variants[:, 0]
    run, seed = evaluation.run, evaluation.config.evaluate.seed
    cost["shares"] = _shares(learnt.owners, np.stack(ranks, axis=1), users, seed=seed)
    for name, metrics in cost["shares"].items():
        drops = (f"{metric} {i['value']:+.4f} [{i['low']:+.4f}, {i['high']:+.4f}]" for metric, i in metrics.items())
        run.log(f"with {name}, against without it: {', '.join(drops)}")
    if learnt.retrieval is not None:
        num, recall = learnt.retrieval.num, bootstrap_interval(np.concatenate(found), users=users, seed=seed)
        run.log(f"recall of the {num} items that are retrieved: {recall.value:.3f} [{recall.low:.3f}, {recall.high:.3f}]")
        cost["recall"] = {"num": num, **recall.to_dict()}


def _ranks(variants: np.ndarray[Any, Any], example: EvalExample) -> np.ndarray[Any, Any]:
    """(C, V) scores of V variants -> the rank of the target in each (V,)."""
    place = int(np.flatnonzero(example.candidates == example.target)[0])
    return target_ranks(variants.T, target=place)


def _shares(
    owners: list[str], ranks: np.ndarray[Any, Any], users: list[int], *, seed: int
) -> dict[str, dict[str, dict[str, float | int]]]:
    """How much the whole ensemble is above the one without each member or term: paired, with 95 % intervals."""
    metrics = {f"hr@{_CUTOFF}": hit_rate, f"ndcg@{_CUTOFF}": ndcg}
    return {
        owner: {
            name: paired_difference(metric(ranks[0], _CUTOFF), metric(ranks[number], _CUTOFF), users=users, seed=seed).to_dict()
            for name, metric in metrics.items()
        }
        for number, owner in enumerate(owners, start=1)
    }
