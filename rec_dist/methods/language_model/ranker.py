"""How language models rank: by the log-likelihood of each candidate's title after the history."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer
from rec_dist.methods.eval_examples import eval_examples_of
from rec_dist.methods.initial_weights import InitialWeights, trained
from rec_dist.methods.language_model import corrections
from rec_dist.methods.language_model.builders import build_builder, usable
from rec_dist.methods.language_model.corrections import Correction, Titles
from rec_dist.methods.language_model.embedding import EmbedJob
from rec_dist.methods.language_model.limits import check_examples
from rec_dist.methods.language_model.ranking import EvaluateJob, build_checked_builder, clear_parts, evaluate_worker, gather_parts
from rec_dist.methods.language_model.scorer import CorrectedScorer, LanguageModelScorer, title_lengths
from rec_dist.methods.method import Evaluation, Launch, ScoreStream
from rec_dist.models.pretrained import resolve_model
from rec_dist.models.shape import read_shape
from rec_dist.storage.files import fingerprint


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

    def titles_read(self, saved: Path | None, num_candidates: int) -> int:
        """As Ranker.titles_read: all."""
        return num_candidates

    def weights(self, config: RunConfig, saved: Path | None) -> InitialWeights:
        """As Ranker.weights."""
        if saved is not None and config.adapter.kind == "none":
            return usable(config, InitialWeights(saved))
        base = resolve_model(config.model.path, config.model.revision, trust_remote_code=config.model.trust_remote_code)
        return usable(config, InitialWeights(base) if saved is None else trained(saved, base))

    def check(self, saved: Path, data: PreparedData) -> None:
        """Accepts any data: titles mean the same everywhere, and score() compares the prompt."""

    def score(self, evaluation: Evaluation, launch: Launch) -> tuple[ScoreStream, dict[str, Any]]:
        """As Ranker.score, on the workers of config.cluster."""
        corrections.check(evaluation.config)
        if not evaluation.config.evaluate.corrects:
            return self._scored(evaluation, launch)
        titles = self._titles(evaluation, launch)
        correction = corrections.fixed(evaluation.config.evaluate) or self._chosen(evaluation, titles, launch)
        scores, cost = self._scored(evaluation, launch)
        pairs = zip(scores, evaluation.examples, strict=True)
        return (correction.apply(own, e.candidates, titles) for own, e in pairs), {**cost, **vars(correction)}

    def _titles(self, evaluation: Evaluation, launch: Launch) -> Titles:
        """The titles of the catalogue without a history, from the folder of the results if an earlier pass left them there."""
        config, data, run = evaluation.config, evaluation.data, evaluation.run
        builder = build_builder(config, evaluation.initial.model, data)
        model = [evaluation.initial.fingerprints(), config.model.dtype, self._of(config)]
        key = fingerprint([model, builder.fingerprint, data.manifest.fingerprint])
        logps = corrections.kept_logps(run.path, key)
        if logps is None:
            asked = replace(evaluation, examples=[corrections.bare_catalogue(data.num_items)], own_examples=True)
            (logps,) = (scores.astype(np.float32) for scores in self._scored(asked, launch)[0])
            corrections.keep_logps(run.path, key, logps)
        return Titles(logps, title_lengths(builder))

    def _chosen(self, evaluation: Evaluation, titles: Titles, launch: Launch) -> Correction:
        """The correction that ranks the validation split best."""
        config = corrections.validation_config(evaluation.config)
        examples = eval_examples_of(config, evaluation.data)
        scores, _ = self._scored(replace(evaluation, config=config, examples=examples, own_examples=False), launch)
        correction = corrections.choose(evaluation.config.evaluate, examples, list(scores), titles)
        evaluation.run.log(
            f"of {len(examples):,} validation questions: evaluate.title_prior={correction.title_prior:g}, "
            f"evaluate.length_power={correction.length_power:g}"
        )
        return correction

    def _scored(self, evaluation: Evaluation, launch: Launch) -> tuple[ScoreStream, dict[str, Any]]:
        """The log-likelihoods, uncorrected."""
        config, run = evaluation.config, evaluation.run
        own = list(evaluation.examples) if evaluation.own_examples else None
        job = EvaluateJob(
            config.model_dump(), str(run.path), evaluation.initial, evaluation.saved, self._of(config), examples=own
        )
        builder = build_checked_builder(config, job, evaluation.data)  # raises UserError before a worker is started
        shape = read_shape(evaluation.initial.model, trust_remote_code=config.model.trust_remote_code)
        most = config.train.max_tokens_per_micro_batch
        check_examples(builder, evaluation.examples, max_tokens=most, max_positions=shape.max_positions)
        clear_parts(run.path)
        cost = launch(evaluate_worker, job, config.cluster, run)
        pairs = zip(gather_parts(run.path), evaluation.examples, strict=True)
        return (row[: len(example.candidates)] for row, example in pairs), cost

    @contextmanager
    def scoring(
        self, config: RunConfig, data: PreparedData, initial: InitialWeights, saved: Path | None, device: str
    ) -> Iterator[CandidateScorer]:
        """As Ranker.scoring. The scorer holds the whole model on `device`."""
        corrections.check(config)
        correction = corrections.fixed(config.evaluate)
        if correction is None:
            raise UserError(
                "evaluate.title_prior=valid and evaluate.length_power=valid are chosen by `rec-dist evaluate`, whose row has the "
                "values; set them to these"
            )
        scorer = LanguageModelScorer(config, data, initial, saved, device, temperature=self._of(config))
        yield CorrectedScorer(scorer, correction, data.num_items) if config.evaluate.corrects else scorer

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
