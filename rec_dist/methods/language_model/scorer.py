"""A language model as a scorer of candidates in this process, a block of histories at a time. Evaluation uses workers instead.

The same prompts, packing and scores as evaluation (methods/language_model/ranking.py), without DeepSpeed: the whole model is on
one device. The same model also searches its whole catalogue (methods/language_model/search.py).
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prompts.builder import PromptBuilder, check_saved
from rec_dist.data.prompts.title_trie import catalogue_packing
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import Floats, check_lengths
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.builders import build_builder, model_spec
from rec_dist.methods.language_model.corrections import Correction, Titles, bare_catalogue
from rec_dist.methods.language_model.ranking import EvalPrompts, no_loss, score_prompts, table_of
from rec_dist.models.assemble import build_model
from rec_dist.models.flex import FLEX
from rec_dist.models.prompt_cache import PromptCache
from rec_dist.models.scorer import Scorer, check_past, check_scorer
from rec_dist.models.shape import read_shape
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist.ranking.search import Score, Search
from rec_dist.runtime.arrays import F64, I32, I64
from rec_dist.runtime.world import World

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from rec_dist.methods.language_model.search import CatalogueTrie


ONE_CALL = 1 << 28  # bytes of keys and values that a call keeps for itself


class LanguageModelScorer:
    """Implements SearchScorer and KeepsPrompts: an item's log-likelihood of its title and end tokens after the history, in nats.

    temperature: as in Objective.

    Raises UserError if the model of a run was trained with another prompt, or its attention ignores the mask.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        initial: InitialWeights,
        saved: Path | None,
        device: str,
        *,
        temperature: float | None = None,
    ) -> None:
        initial = initial.on_this_node(code=config.model.trust_remote_code)
        self.builder = build_builder(config, initial.model, data)
        if saved is not None:
            check_saved(self.builder, saved)
        spec = model_spec(config, initial, self.builder, device, trains=False)
        self._module = Scorer(build_model(spec), no_loss, ()).to(device).eval().requires_grad_(False)
        self._device, self._max_tokens, self._dtype = device, config.train.max_tokens_per_micro_batch, spec.dtype
        self._max_positions = read_shape(initial.model, trust_remote_code=config.model.trust_remote_code).max_positions
        self._set_temperature(temperature)
        check_scorer(self._module, self._logps, dtype=spec.dtype)
        self._kept: PromptCache | None = None
        self._checked_past = False

    def _set_temperature(self, temperature: float | None) -> None:
        self._temperature = temperature
        self._pack = pack_prompts if temperature is None else catalogue_packing(self.builder, temperature)
        self._catalogue: CatalogueTrie | None = None

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """As CandidateScorer.score. Reads the last prompt.max_history items of a history.

        Raises UserError for a prompt longer than a micro-batch or than the model, and for lists of another length than a prompt lists.
        """
        check_lengths(histories, candidates)
        if not len(histories):
            return []
        shown = self.builder.listed
        if wrong := [len(items) for items in candidates if shown and len(items) != shown]:
            raise UserError(
                f"prompt.num_candidates is {shown} and a user has {wrong[0]} candidates, which the prompt would list; give each "
                f"user {shown} that are items of the catalogue"
            )
        examples = [
            EvalExample(number, len(history), -1, history, items)
            for number, (history, items) in enumerate(zip(histories, candidates, strict=True))
        ]
        prompts = EvalPrompts(self.builder, examples, self._max_tokens, self._max_positions)
        cache, world = self._cache_for(prompts), World(device=self._device)
        logps = lambda batch: self._logps(batch, cache)
        given = score_prompts(logps, prompts, world, self._max_tokens, lambda done: None, pack=self._pack)
        scores = table_of(prompts, given)  # (B, C)
        return [row[: len(items)].astype(np.float64) for row, items in zip(scores, candidates, strict=True)]

    @property
    def title_lengths(self) -> I64:
        """(I,): as title_lengths()."""
        return title_lengths(self.builder)

    def scoring_by(self, score: Score) -> "LanguageModelScorer":
        """As SearchScorer.scoring_by. `trie` has the temperature of the run's method, or 1."""
        other = copy.copy(self)  # with the same module
        other._set_temperature(None if score == "raw" else self._temperature or 1.0)
        return other

    def search(self, history: I32, *, prior: F64 | None = None, weight: float = 1.0) -> Search:
        """As SearchScorer.search. Raises UserError for a model that cannot keep the keys and values of a tree of tokens."""
        from rec_dist.methods.language_model.search import CatalogueTrie, check_kept, search_titles

        if self.builder.listed:
            raise UserError(
                "prompt.candidates=listed shows candidates in the prompt, so the catalogue cannot be searched with it"
            )
        if self._catalogue is None:
            check_kept(self._module, self._dtype)
            self._catalogue = CatalogueTrie(self.builder, self._temperature)
        return search_titles(self._module, self.builder, self._catalogue, history, prior, weight, self._max_tokens)

    def keep_prompts(self, cache: PromptCache) -> None:
        """As KeepsPrompts.keep_prompts. Raises UserError for a model that cannot."""
        self._check_past()
        self._kept = cache

    def _check_past(self) -> None:
        if not self._checked_past:
            check_past(self._module, self._logps, dtype=self._dtype)
        self._checked_past = True

    def _cache_for(self, prompts: EvalPrompts) -> PromptCache | None:
        """The cache of keep_prompts(), or one for this call alone if a list is cut, so that its prompt runs once.

        What is left from other calls would change the last bits of scores, which must not depend on where a ranking was stopped.
        """
        if self._kept is not None or len(prompts.places) == len(prompts.examples):
            return self._kept
        if self._module.base.config._attn_implementation == FLEX:
            return None
        self._check_past()
        return PromptCache(ONE_CALL)

    @torch.no_grad()
    def _logps(self, batch: PackedBatch, cache: PromptCache | None = None) -> Tensor:
        if cache is None:
            logps: Tensor = self._module(batch.to(self._device))[2]
            return logps.float().cpu()
        from rec_dist.models.past_prompts import keep, past_of

        model = id(self._module)
        past = past_of(batch, cache, model, len(self.builder.pieces.begin))
        logps = self._module(batch.to(self._device), past)[2].float().cpu()
        keep(past, cache, model)
        return logps


class CorrectedScorer:
    """Implements KeepsPrompts: scores of a LanguageModelScorer, corrected. Begins with one pass over the titles of the catalogue."""

    def __init__(self, scorer: LanguageModelScorer, correction: Correction, num_items: int) -> None:
        bare = bare_catalogue(num_items)
        (logps,) = scorer.score([bare.history], [bare.candidates])
        self._titles = Titles(logps.astype(np.float32), scorer.title_lengths)
        self._scorer, self._correction = scorer, correction

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """As LanguageModelScorer.score."""
        scores = self._scorer.score(histories, candidates)
        return [self._correction.apply(own, items, self._titles) for own, items in zip(scores, candidates, strict=True)]

    def keep_prompts(self, cache: PromptCache) -> None:
        """As LanguageModelScorer.keep_prompts."""
        self._scorer.keep_prompts(cache)


def title_lengths(builder: PromptBuilder) -> I64:
    """(I,): the tokens of each title, its end included."""
    return (builder.titles.lengths + len(builder.pieces.end)).astype(np.int64)
