"""What answers the questions of a server: a scorer, as `rec-dist rank` uses it, over whatever requests came together.

All requests of a batch go to the scorer in one call, which packs them into one stream, whatever they ask for. Selection is that of
`rec-dist rank`, so a served list is the ranked one. A question that the scorer fails on is found by halving the batch, and fails
alone: at most 2 log2 of the batch further calls for each.

C candidates of a question, k items of an answer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import NotFiniteError, UserError, one_line
from rec_dist.evaluation.baselines import CandidateScorer, Floats, KeepsPrompts, PopularityScorer, score_with_members
from rec_dist.evaluation.metrics import check_numbers
from rec_dist.models.prompt_cache import PromptCache, PromptCounts
from rec_dist.ranking.selection import best_of, best_of_pool
from rec_dist.runtime.arrays import I32


@dataclass(frozen=True)
class Query:
    """A question. history (n,): items, oldest first. candidates (C,): items, for a list each once; None for the whole catalogue.

    top_k None asks for the score of every candidate in the order given, else for the best k. members: also what each adds.
    """

    history: I32
    candidates: I32 | None
    top_k: int | None = None
    exclude_seen: bool = False
    members: bool = False


@dataclass(frozen=True)
class Answer:
    """items (k,) with their scores (k,), and what each member adds (k,). fallback: scored by popularity, without a known item."""

    items: I32
    scores: Floats
    members: dict[str, Floats]
    fallback: bool


@dataclass(frozen=True)
class Refusal:
    """What is wrong with a question, in one sentence."""

    sentence: str


@dataclass(frozen=True)
class Failure:
    """The scorer fails on a question, also without others beside it. sentence: how, for the log."""

    sentence: str


Outcome = Answer | Refusal | Failure


@dataclass(frozen=True)
class Outcomes:
    """Of the questions of a batch. prompts: what language models found of their prompts meanwhile."""

    each: list[Outcome]
    prompts: PromptCounts


class Engine:
    """Answers with a loaded scorer until close(). Takes one call at a time.

    prompt_bytes: of keys and values of prompts that language models keep between calls; 0: none.
    """

    def __init__(self, data: PreparedData, scorer: AbstractContextManager[CandidateScorer], *, prompt_bytes: int = 0) -> None:
        self._prompts = PromptCache(prompt_bytes)
        with ExitStack() as stack:
            self._scorer = stack.enter_context(scorer)
            if prompt_bytes and isinstance(self._scorer, KeepsPrompts):
                self._scorer.keep_prompts(self._prompts)
                self._prompts.take_counts()  # of the model's check
            self._open = stack.pop_all()
        self._popularity = PopularityScorer(data.train_counts)
        self._catalogue = np.arange(data.num_items, dtype=np.int32)

    def answer(self, queries: Sequence[Query]) -> Outcomes:
        """The answer to each question, or why there is none."""
        outcomes: list[Outcome] = [Refusal("")] * len(queries)
        known = [place for place, query in enumerate(queries) if len(query.history)]
        others = [place for place, query in enumerate(queries) if not len(query.history)]
        for places, scorer in ((known, self._scorer), (others, self._popularity)):
            if places:
                found = self._answer(scorer, [queries[place] for place in places])
                for place, one in zip(places, found, strict=True):
                    outcomes[place] = one
        return Outcomes(outcomes, self._prompts.take_counts())

    def close(self) -> None:
        """Lets go of the scorer and its model."""
        self._open.close()

    def _answer(self, scorer: CandidateScorer, queries: list[Query]) -> list[Outcome]:
        histories = [query.history for query in queries]
        candidates = [self._catalogue if query.candidates is None else query.candidates for query in queries]
        try:
            scores, members = score_with_members(scorer, histories, candidates)
        except UserError as fault:
            problem: Outcome = Refusal(str(fault))
        except Exception as fault:  # whatever it is, it is of one question as far as we know
            problem = Failure(f"{type(fault).__name__}: {one_line(fault)}")
        else:
            fallback = scorer is self._popularity
            outcomes: list[Outcome] = [
                _selected(query, items, scores[place], {name: values[place] for name, values in members.items()}, fallback)
                for place, (query, items) in enumerate(zip(queries, candidates, strict=True))
            ]
            if len(queries) == 1:
                return outcomes
            # A dense attention mask multiplies what others see by 0, and 0 times NaN is NaN: so each is asked again, alone.
            return [
                self._answer(scorer, [query])[0] if isinstance(outcome, Failure) else outcome
                for query, outcome in zip(queries, outcomes, strict=True)
            ]
        if len(queries) == 1:
            return [problem]
        half = len(queries) // 2
        return [*self._answer(scorer, queries[:half]), *self._answer(scorer, queries[half:])]


def _selected(query: Query, items: I32, scores: Floats, members: dict[str, Floats], fallback: bool) -> Answer | Failure:
    try:
        check_numbers(scores)
    except NotFiniteError as fault:
        return Failure(str(fault))
    places = np.arange(len(items))
    if query.top_k is not None:
        seen = query.history if query.exclude_seen else query.history[:0]
        if query.candidates is None:
            (places,) = best_of_pool(scores[None].astype(np.float64), [np.unique(seen).astype(np.int64)], query.top_k)
        else:
            kept = np.flatnonzero(~np.isin(items, seen))
            places = kept[best_of(items[kept], scores[kept], query.top_k)]
    added = {name: values[places] for name, values in members.items()} if query.members else {}
    return Answer(items[places], scores[places], added, fallback)
