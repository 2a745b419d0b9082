"""How retrieval ranks: one prompt a history on the workers, then one product with the vectors of the whole catalogue."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prompts.builder import check_saved
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, Floats, check_lengths
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.builders import build_builder, model_spec
from rec_dist.methods.language_model.embedding import EmbedJob
from rec_dist.methods.language_model.ranker import LanguageModelRanker
from rec_dist.methods.language_model.ranking import EvaluateJob, build_checked_builder, clear_parts, gather_parts
from rec_dist.methods.method import Evaluation, Launch, ScoreStream
from rec_dist.methods.retrieval.batch import LOGITS_AT_ONCE
from rec_dist.methods.retrieval.examples import TitlePrompts
from rec_dist.methods.retrieval.ranking import HistoryPrompts, encode_histories, encode_worker
from rec_dist.methods.retrieval.saved_model import DESCRIPTION, RetrievalModel, load_retrieval
from rec_dist.models.assemble import build_model
from rec_dist.models.encoder import Encoder, check_encoder
from rec_dist.models.shape import read_shape
from rec_dist.packing.pooled_prompts import PooledPrompts
from rec_dist.runtime.arrays import F32, I32
from rec_dist.runtime.world import World


class RetrievalRanker:
    """Implements Ranker. `language` does what does not concern the items."""

    language = LanguageModelRanker()
    language_model = True

    def scores_titles(self, saved: Path | None) -> bool:
        """As Ranker.scores_titles."""
        return False

    def titles_read(self, saved: Path | None, num_candidates: int) -> int:
        """As Ranker.titles_read: none."""
        return 0

    def weights(self, config: RunConfig, saved: Path | None) -> InitialWeights:
        """As Ranker.weights. Raises UserError for None: an untrained head knows no items."""
        if saved is None:
            raise UserError(
                f"task.kind={config.task.kind} has no base model; train it and give {config.train.run_dir}, or set task.kind=sft or "
                "evaluate.ranker=popularity"
            )
        return self.language.weights(config, saved)

    def check(self, saved: Path, data: PreparedData) -> None:
        """Raises UserError for another data set, where item ids mean other items."""
        DESCRIPTION.check(saved, data)

    def score(self, evaluation: Evaluation, launch: Launch) -> tuple[ScoreStream, dict[str, Any]]:
        """As Ranker.score, on the workers of config.cluster: log-probabilities under the softmax over the whole catalogue."""
        config, run = evaluation.config, evaluation.run
        assert evaluation.saved is not None
        model = load_retrieval(evaluation.saved)
        own = list(evaluation.examples) if evaluation.own_examples else None
        job = EvaluateJob(
            config.model_dump(), str(run.path), evaluation.initial, evaluation.saved, pooling=model.pooling, examples=own
        )
        examples, prompts = evaluation.examples, TitlePrompts(build_checked_builder(config, job, evaluation.data), model.pooling)
        shape = read_shape(evaluation.initial.model, trust_remote_code=config.model.trust_remote_code)
        # Both raise UserError before a worker is started.
        HistoryPrompts(prompts, examples).lengths(config.train.max_tokens_per_micro_batch, shape.max_positions)
        clear_parts(run.path)
        cost = launch(encode_worker, job, config.cluster, run)
        states = np.stack(list(gather_parts(run.path)))  # (U, D)
        return log_probs(model, states, ((e.history, e.candidates) for e in examples)), cost

    @contextmanager
    def scoring(
        self, config: RunConfig, data: PreparedData, initial: InitialWeights, saved: Path | None, device: str
    ) -> Iterator[CandidateScorer]:
        """As Ranker.scoring. The scorer holds the whole encoder on `device`."""
        assert saved is not None, "weights() refuses a base model"
        yield RetrievalScorer(config, data, initial, saved, device)

    def embed(self, config: RunConfig, folder: Path, saved: Path | None) -> EmbedJob:
        """As Ranker.embed, with the trained encoder."""
        return self.language.embed(config, folder, saved)

    def exported(self, config: RunConfig, saved: Path) -> InitialWeights:
        """As Ranker.exported: the encoder alone."""
        return self.language.exported(config, saved)

    def scores_text(self, config: RunConfig) -> bool:
        """As Ranker.scores_text: a score is a product of vectors."""
        return False


class RetrievalScorer:
    """Scores in this process, as score() does on workers. Raises UserError if the run was trained with another prompt."""

    def __init__(self, config: RunConfig, data: PreparedData, initial: InitialWeights, saved: Path, device: str) -> None:
        initial = initial.on_this_node(code=config.model.trust_remote_code)
        self._model = load_retrieval(saved)
        builder = build_builder(config, initial.model, data)
        check_saved(builder, saved)
        self._prompts = TitlePrompts(builder, self._model.pooling)
        spec = model_spec(config, initial, None, device, trains=False)
        self._encoder = Encoder(build_model(spec)).to(device).eval().requires_grad_(False)
        self._device, self._max_tokens = device, config.train.max_tokens_per_micro_batch
        self._shape = read_shape(initial.model, trust_remote_code=config.model.trust_remote_code)
        check_encoder(self._encoder, self._states, dtype=spec.dtype)

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """As CandidateScorer.score. Reads the last prompt.max_history items of a history."""
        check_lengths(histories, candidates)
        if not len(histories):
            return []
        examples = [
            EvalExample(number, len(history), -1, history, items)
            for number, (history, items) in enumerate(zip(histories, candidates, strict=True))
        ]
        prompts = HistoryPrompts(self._prompts, examples)
        lengths, world = prompts.lengths(self._max_tokens, self._shape.max_positions), World(device=self._device)
        states = encode_histories(self._states, prompts, lengths, world, self._max_tokens, self._shape.width, lambda done: None)
        return [scores.astype(np.float64) for scores in log_probs(self._model, states, zip(histories, candidates, strict=True))]

    @torch.no_grad()
    def _states(self, batch: PooledPrompts) -> Tensor:
        states: Tensor = self._encoder(batch.to(self._device)).float().cpu()
        return states


def log_probs(model: RetrievalModel, states: F32, asked: Iterable[tuple[I32, I32]]) -> Iterator[Floats]:
    """states (U, D) of the last titles; asked: history and candidates (C_u,) of each -> (C_u,) each, in nats.

    Cost: I * W multiply-adds a history; LOGITS_AT_ONCE logits in memory.
    """
    terms, at_once = model.terms.tolist(), max(1, LOGITS_AT_ONCE // len(model.table.vectors))
    given = iter(asked)
    for start in range(0, len(states), at_once):
        block = list(islice(given, min(at_once, len(states) - start)))
        logits = model.logits(model.users(torch.from_numpy(states[start : start + at_once]))).double()
        for row, (history, _) in zip(logits, block, strict=True):
            last, before = int(history[-1]), np.setdiff1d(history, history[-1:])
            row[torch.from_numpy(before.astype(np.int64))] += terms[0] / model.temperature
            row[last] += terms[1] / model.temperature
        logps = logits.log_softmax(dim=1).numpy()
        yield from (row[items] for row, (_, items) in zip(logps, block, strict=True))
