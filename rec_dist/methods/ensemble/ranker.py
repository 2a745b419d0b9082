"""How an ensemble ranks: by the weighted sum of its features."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, Floats, KeepsPrompts, check_lengths, total_of
from rec_dist.methods.ensemble.features import member_of, parts_of, terms_of
from rec_dist.methods.ensemble.folder import DESCRIPTION
from rec_dist.methods.ensemble.members import copied_members
from rec_dist.methods.ensemble.rerank import spread, staged_blocks, titles_read, two_stages
from rec_dist.methods.ensemble.saved_model import EnsembleWeights
from rec_dist.methods.ensemble.shares import scores_and_shares
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import Evaluation, Launch, ScoreStream
from rec_dist.models.prompt_cache import PromptCache
from rec_dist.ranking.search import Score, Search, SearchScorer
from rec_dist.runtime.arrays import I32, I64


class EnsembleRanker:
    """Implements Ranker. Members that are language models score on the workers of config.cluster, others in this process."""

    language_model = False

    def scores_titles(self, saved: Path | None) -> bool:
        """As Ranker.scores_titles: whether a member does, for all candidates."""
        if saved is None or (learnt := EnsembleWeights.read(saved)).retrieval is not None:
            return False
        return any(member.scores_titles for member in copied_members(saved, learnt.members))

    def titles_read(self, saved: Path | None, num_candidates: int) -> int:
        """As Ranker.titles_read: those of all members."""
        assert saved is not None, "weights() refuses a base model"
        learnt = EnsembleWeights.read(saved)
        return titles_read(copied_members(saved, learnt.members), learnt.num_retrieved, num_candidates)

    def weights(self, config: RunConfig, saved: Path | None) -> InitialWeights:
        """As Ranker.weights. Raises UserError for None: an ensemble has no base model."""
        if saved is None:
            raise UserError(f"task.kind={config.task.kind} has no base model; train it and give {config.train.run_dir}")
        members = copied_members(saved, EnsembleWeights.read(saved).members)
        return InitialWeights(saved, members=tuple((member.name, member.folder) for member in members))

    def check(self, saved: Path, data: PreparedData) -> None:
        """Raises UserError for another data set, or if a member is damaged."""
        DESCRIPTION.check(saved, data)
        for member in copied_members(saved, EnsembleWeights.read(saved).members):
            member.check(data)

    def score(self, evaluation: Evaluation, launch: Launch) -> tuple[ScoreStream, dict[str, Any]]:
        """As Ranker.score, with what leaving each member out changes: {"shares": {name: {metric: interval}}}.

        In two stages also {"recall": {"num": N, **interval}}: how often the target is among the N items retrieved.
        """
        folder = evaluation.initial.model
        learnt = EnsembleWeights.read(folder)
        members = copied_members(folder, learnt.members)
        blocks, read = staged_blocks(members, learnt.terms, learnt.retrieval, evaluation, launch)
        cost: dict[str, Any] = {}
        return scores_and_shares(learnt, blocks, read, evaluation, cost), cost

    @contextmanager
    def scoring(
        self, config: RunConfig, data: PreparedData, initial: InitialWeights, saved: Path | None, device: str
    ) -> Iterator[CandidateScorer]:
        """As Ranker.scoring, with all members in this process."""
        learnt = EnsembleWeights.read(initial.model)
        with ExitStack() as stack:
            members = two_stages(copied_members(initial.model, learnt.members), learnt.num_retrieved)
            cheap, reading = (
                {member.name: stack.enter_context(member.scoring(config, data, device)) for member in stage} for stage in members
            )
            yield EnsembleScorer(learnt, cheap, data, reading)

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
    """Implements MemberScorer and KeepsPrompts, and SearchScorer if one member does: the weighted sum.

    scorers: of the members, by name. reading: of those that score what is retrieved alone.
    """

    def __init__(
        self,
        learnt: EnsembleWeights,
        scorers: Mapping[str, CandidateScorer],
        data: PreparedData,
        reading: Mapping[str, CandidateScorer] = {},
    ) -> None:
        self._learnt, self._scorers, self._counts, self._reading = learnt, scorers, data.train_counts, reading

    @property
    def members(self) -> list[str]:
        """The members and terms."""
        return self._learnt.owners

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """Scores as CandidateScorer.score does."""
        return total_of(self.score_members(histories, candidates))

    def score_members(self, histories: Sequence[I32], candidates: Sequence[I32]) -> dict[str, list[Floats]]:
        """As MemberScorer.score_members: the weighted features of each member, and each term."""
        return self._added(self._scorers, histories, candidates)

    def scoring_by(self, score: Score) -> NoReturn:
        """Raises UserError: the weights belong to the scores that the members have."""
        raise UserError(
            f"--score ({score}) would change a member's score, and an ensemble's weights do not fit it then; leave it out"
        )

    def search(self, history: I32, *, prior: Floats | None = None, weight: float = 1.0) -> Search:
        """As SearchScorer.search: the one member that scores titles is searched, and what the others add is a prior.

        Raises UserError unless exactly one member can be searched, or if that member has no weight.
        """
        titled = self._titled
        weights = [
            value for name, value in zip(self._learnt.features, self._learnt.weights.tolist(), strict=True) if name in titled
        ]
        assert self._learnt.retrieval is None, "rank refuses --search for a ranker that does not score all titles"
        if len(titled) != 1 or weights[0] <= 0:
            raise UserError(
                "--search needs an ensemble with exactly one member that can be searched (a language model whose scores are not "
                f"corrected) and has a weight; here these are: {', '.join(titled) or 'none'}, with weights {weights}; leave --search "
                "out"
            )
        every = np.arange(len(self._counts), dtype=np.int32)
        others = {name: scorer for name, scorer in self._scorers.items() if name not in titled}
        added = sum((parts[0] for parts in self._added(others, [history], [every]).values()), np.zeros(len(every)))
        (scorer,) = titled.values()
        return scorer.search(history, prior=weight * added + (0 if prior is None else prior), weight=weight * weights[0])

    @property
    def _titled(self) -> dict[str, SearchScorer]:
        """The members that can be searched. An ensemble is one of them if it has such a member itself, in one stage."""
        if self._learnt.retrieval is not None:
            return {}
        return {
            name: scorer
            for name, scorer in self._scorers.items()
            if isinstance(scorer, SearchScorer) and (not isinstance(scorer, EnsembleScorer) or scorer._titled)
        }

    def keep_prompts(self, cache: PromptCache) -> None:
        """As KeepsPrompts.keep_prompts: one cache for all members that can."""
        for scorer in (*self._scorers.values(), *self._reading.values()):
            if isinstance(scorer, KeepsPrompts):
                scorer.keep_prompts(cache)

    def _added(
        self, scorers: Mapping[str, CandidateScorer], histories: Sequence[I32], candidates: Sequence[I32]
    ) -> dict[str, list[Floats]]:
        """What each owner adds, 0 for members that are not among `scorers`."""
        check_lengths(histories, candidates)
        features = terms_of(self._learnt.terms, self._counts, histories, candidates)
        for name, scorer in scorers.items():
            features |= parts_of(name, scorer, histories, candidates)
        if self._learnt.retrieval is not None:
            features |= self._titles(self._learnt.retrieval.places(features, histories, candidates), histories, candidates)
        added = {owner: [np.zeros(len(items)) for items in candidates] for owner in self._learnt.owners}
        for name, weight in zip(self._learnt.features, self._learnt.weights.tolist(), strict=True):
            for total, values in zip(added[member_of(name)], features.get(name, []), strict=name in features):
                total += weight * values
        return added

    def _titles(self, places: list[I64], histories: Sequence[I32], candidates: Sequence[I32]) -> dict[str, list[Floats]]:
        """The features of the members that score the candidates at `places` alone."""
        filled = [number for number, chosen in enumerate(places) if len(chosen)]
        features: dict[str, list[Floats]] = {}
        for name, scorer in self._reading.items():
            features[name] = [np.zeros(len(items)) for items in candidates]
            scored = scorer.score([histories[n] for n in filled], [candidates[n][places[n]] for n in filled])
            for number, scores in zip(filled, scored, strict=True):
                features[name][number] = spread(scores, places[number], len(candidates[number]))
        return features
