"""How language models rank: by the log-likelihood of each candidate's title after the history."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.evaluation.baselines import CandidateScorer
from rec_dist.methods.initial_weights import InitialWeights, trained
from rec_dist.methods.language_model.embedding import EmbedJob
from rec_dist.methods.language_model.ranking import EvaluateJob, build_checked_builder, clear_parts, evaluate_worker, gather_parts
from rec_dist.methods.language_model.scorer import LanguageModelScorer
from rec_dist.methods.method import Evaluation, Launch, Scores
from rec_dist.models.pretrained import resolve_model


class LanguageModelRanker:
    """Implements Ranker for a base model, alone or with an adapter or soft prompts, and for a model that was trained whole.

    temperature: configuration -> as in Objective.
    """

    language_model = True

    def __init__(self, temperature: Callable[[RunConfig], float] | None = None) -> None:
        self._temperature = temperature

    def scores_titles(self, saved: Path | None) -> bool:
        """As Ranker.scores_titles."""
        return True

    def weights(self, config: RunConfig, saved: Path | None) -> InitialWeights:
        """As Ranker.weights."""
        if saved is not None and config.adapter.kind == "none":
            return InitialWeights(saved)
        base = resolve_model(config.model.path, config.model.revision, trust_remote_code=config.model.trust_remote_code)
        return InitialWeights(base) if saved is None else trained(saved, base)

    def check(self, saved: Path, data: PreparedData) -> None:
        """Accepts any data: titles mean the same everywhere, and score() compares the prompt."""

    def score(self, evaluation: Evaluation, launch: Launch) -> tuple[Scores, dict[str, Any]]:
        """As Ranker.score, on the workers of config.cluster."""
        config, run = evaluation.config, evaluation.run
        job = EvaluateJob(config.model_dump(), str(run.path), evaluation.initial, evaluation.saved, self._of(config))
        build_checked_builder(config, job, evaluation.data)  # raises UserError before a worker is started
        clear_parts(run.path)
        cost = launch(evaluate_worker, job, config.cluster, run)
        merged = gather_parts(run.path)  # (U, C)
        return [row[: len(example.candidates)] for row, example in zip(merged, evaluation.examples, strict=True)], cost

    @contextmanager
    def scoring(
        self, config: RunConfig, data: PreparedData, initial: InitialWeights, saved: Path | None, device: str
    ) -> Iterator[CandidateScorer]:
        """As Ranker.scoring. The scorer holds the whole model on `device`."""
        yield LanguageModelScorer(config, data, initial, saved, device, temperature=self._of(config))

    def embed(self, config: RunConfig, folder: Path, saved: Path | None) -> EmbedJob:
        """As Ranker.embed."""
        return EmbedJob(config.model_dump(), str(folder), self.weights(config, saved), saved)

    def exported(self, config: RunConfig, saved: Path) -> InitialWeights:
        """As Ranker.exported."""
        return self.weights(config, saved)

    def scores_text(self, config: RunConfig) -> bool:
        """As Ranker.scores_text: not where only the words of the catalogue share the probability."""
        return self._temperature is None

    def _of(self, config: RunConfig) -> float | None:
        return None if self._temperature is None else self._temperature(config)
