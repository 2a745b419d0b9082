"""How an ensemble ranks: the weighted sum of its features; and what each member adds, by ranks without it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, Floats, check_lengths
from rec_dist.evaluation.bootstrap import paired_difference
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.metrics import hit_rate, ndcg, target_ranks
from rec_dist.methods.ensemble.features import parts_of, terms_of
from rec_dist.methods.ensemble.members import copied_members, feature_blocks
from rec_dist.methods.ensemble.saved_model import DESCRIPTION, EnsembleWeights
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import Evaluation, Launch, ScoreStream
from rec_dist.runtime.arrays import I32

_CUTOFF = 10


class EnsembleRanker:
    """Implements Ranker. Members that are language models score on the workers of config.cluster, others in this process."""

    language_model = False

    def scores_titles(self, saved: Path | None) -> bool:
        """As Ranker.scores_titles: whether a member does."""
        members = [] if saved is None else copied_members(saved, EnsembleWeights.read(saved).members)
        return any(member.ranker.scores_titles(member.folder) for member in members)

    def weights(self, config: RunConfig, saved: Path | None) -> InitialWeights:
        """As Ranker.weights. Raises UserError for None: an ensemble has no base model."""
        if saved is None:
            raise UserError(f"task.kind={config.task.kind} has no base model; train it and give its run directory")
        members = copied_members(saved, EnsembleWeights.read(saved).members)
        return InitialWeights(saved, members=tuple((member.name, member.folder) for member in members))

    def check(self, saved: Path, data: PreparedData) -> None:
        """Raises UserError for another data set, or if a member is damaged."""
        DESCRIPTION.check(saved, data)
        for member in copied_members(saved, EnsembleWeights.read(saved).members):
            member.check(data)

    def score(self, evaluation: Evaluation, launch: Launch) -> tuple[ScoreStream, dict[str, Any]]:
        """As Ranker.score, with what leaving each member out changes: {"shares": {name: {metric: interval}}}."""
        folder = evaluation.initial.model
        learnt = EnsembleWeights.read(folder)
        members = copied_members(folder, learnt.members)
        scores: list[Floats] = []
        ranks: list[npt.NDArray[np.int64]] = []  # (M + 1,) of each question
        rows = np.concatenate([learnt.weights[None], learnt.without])  # (M + 1, F)
        for block, features in feature_blocks(members, learnt.terms, evaluation, launch):
            for place, example in enumerate(block):
                values = np.stack([features[name][place] for name in learnt.features], axis=1)  # (C, F)
                variants = values @ rows.T  # (C, M + 1)
                ranks.append(_ranks(variants, example))
                scores.append(variants[:, 0])
        users = [example.user_id for example in evaluation.examples]
        seed = evaluation.config.evaluate.seed
        shares = _shares(learnt.owners, np.stack(ranks, axis=1), users, seed=seed)
        for name, metrics in shares.items():
            drops = (f"{metric} {i['value']:+.4f} [{i['low']:+.4f}, {i['high']:+.4f}]" for metric, i in metrics.items())
            evaluation.run.log(f"with {name}, against without it: {', '.join(drops)}")
        return scores, {"shares": shares}

    @contextmanager
    def scoring(
        self, config: RunConfig, data: PreparedData, initial: InitialWeights, saved: Path | None, device: str
    ) -> Iterator[CandidateScorer]:
        """As Ranker.scoring, with all members in this process."""
        learnt = EnsembleWeights.read(initial.model)
        with ExitStack() as stack:
            scorers = {
                member.name: stack.enter_context(member.scoring(config, data, device))
                for member in copied_members(initial.model, learnt.members)
            }
            yield EnsembleScorer(learnt, scorers, data)

    def embed(self, config: RunConfig, folder: Path, saved: Path | None) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"task.kind={config.task.kind} makes no vectors of titles; give the run of a language model")

    def exported(self, config: RunConfig, saved: Path) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{saved} is an ensemble; export takes the run of a language model")

    def scores_text(self, config: RunConfig) -> bool:
        """As Ranker.scores_text."""
        return False


class EnsembleScorer:
    """Scores by the weighted sum. scorers: of the members, by name."""

    def __init__(self, learnt: EnsembleWeights, scorers: Mapping[str, CandidateScorer], data: PreparedData) -> None:
        self._learnt, self._scorers, self._counts = learnt, scorers, data.train_counts

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """Scores as CandidateScorer.score does."""
        check_lengths(histories, candidates)
        features = terms_of(self._learnt.terms, self._counts, histories, candidates)
        for name, scorer in self._scorers.items():
            features |= parts_of(name, scorer, histories, candidates)
        weighted = list(zip(self._learnt.features, self._learnt.weights.tolist(), strict=True))
        return [
            sum((weight * features[name][place] for name, weight in weighted), np.zeros(len(items)))
            for place, items in enumerate(candidates)
        ]


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
