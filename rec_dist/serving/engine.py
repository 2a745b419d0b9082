"""What answers the questions of a server: a scorer, as `rec-dist rank` uses it, over whatever requests came together.

All requests of a batch go to the scorer in one call, which packs them into one stream, whatever they ask for. Selection is that of
`rec-dist rank`, so a served list is the ranked one.

C candidates of a question, k items of an answer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, Floats, MemberScorer, PopularityScorer
from rec_dist.ranking.selection import best_of, best_of_pool
from rec_dist.runtime.arrays import I32

_Shares = dict[str, Floats]  # (C,) of each member


@dataclass(frozen=True)
class Query:
    """A question. history (n,): items, oldest first. candidates (C,): items, for a list each once; None for the whole catalogue.

    top_k None asks for the score of every candidate in the order given, else for the best k. members: with each member's share.
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
    members: _Shares
    fallback: bool


@dataclass(frozen=True)
class Refusal:
    """What is wrong with a question, in one sentence."""

    sentence: str


class Engine:
    """Answers with a loaded scorer until close(). Takes one call at a time."""

    def __init__(self, data: PreparedData, scorer: AbstractContextManager[CandidateScorer]) -> None:
        with ExitStack() as stack:
            self._scorer = stack.enter_context(scorer)
            self._open = stack.pop_all()
        self._popularity = PopularityScorer(data.train_counts)
        self._catalogue = np.arange(data.num_items, dtype=np.int32)

    def answer(self, queries: Sequence[Query]) -> list[Answer | Refusal]:
        """The answer to each question, or why there is none. Raises what the scorer raises, but for a UserError."""
        answers: list[Answer | Refusal] = [Refusal("")] * len(queries)
        known = [place for place, query in enumerate(queries) if len(query.history)]
        others = [place for place, query in enumerate(queries) if not len(query.history)]
        for places, scorer in ((known, self._scorer), (others, self._popularity)):
            if places:
                found = self._answer(scorer, [queries[place] for place in places])
                for place, one in zip(places, found, strict=True):
                    answers[place] = one
        return answers

    def close(self) -> None:
        """Lets go of the scorer and its model."""
        self._open.close()

    def _answer(self, scorer: CandidateScorer, queries: list[Query]) -> list[Answer | Refusal]:
        histories = [query.history for query in queries]
        candidates = [self._catalogue if query.candidates is None else query.candidates for query in queries]
        shares: dict[str, list[Floats]] = {}
        try:
            if isinstance(scorer, MemberScorer) and any(query.members for query in queries):
                shares = scorer.score_members(histories, candidates)
                scores = [sum(parts, np.zeros(len(parts[0]))) for parts in zip(*shares.values(), strict=True)]
            else:
                scores = scorer.score(histories, candidates)
        except UserError as fault:  # of one question; the others must not suffer
            return [Refusal(str(fault))] if len(queries) == 1 else [self._answer(scorer, [one])[0] for one in queries]
        fallback = scorer is self._popularity
        return [
            self._selected(query, items, scores[place], {name: values[place] for name, values in shares.items()}, fallback)
            for place, (query, items) in enumerate(zip(queries, candidates, strict=True))
        ]

    def _selected(self, query: Query, items: I32, scores: Floats, shares: _Shares, fallback: bool) -> Answer:
        shares = shares if query.members else {}
        if query.top_k is None:
            return Answer(items, scores, shares, fallback)
        if query.candidates is None:
            seen = np.unique(query.history).astype(np.int64) if query.exclude_seen else np.empty(0, dtype=np.int64)
            best, values = best_of_pool(items, scores[None].astype(np.float64), [seen], query.top_k)[0]
            places = best
        else:
            kept = np.flatnonzero(~np.isin(items, query.history)) if query.exclude_seen else np.arange(len(items))
            best, values = best_of(items[kept], scores[kept], query.top_k)
            place_of = {item: place for place, item in enumerate(items.tolist())}
            places = np.asarray([place_of[item] for item in best.tolist()], dtype=np.int32)
        return Answer(best, values, {name: own[places] for name, own in shares.items()}, fallback)
