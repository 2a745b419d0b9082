"""Which items a user's list may hold, and the best of them: the pool with every score, a list of candidates, or the pool searched.

B users of a block, C candidates of a user, I items of the catalogue, n items of a list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rec_dist.evaluation.baselines import CandidateScorer, Floats, MemberScorer, score_with_members
from rec_dist.ranking.candidates import Lists
from rec_dist.ranking.search import SearchScorer
from rec_dist.ranking.selection import best_of, best_of_pool
from rec_dist.runtime.arrays import I32, I64

Column = npt.NDArray[Any]


class UserList(NamedTuple):
    """A user's items (n,) and scores (n,), the best first, and values (n,) of further columns."""

    items: I32
    scores: Floats
    more: Mapping[str, Column] = {}


NO_ITEMS = UserList(np.empty(0, dtype=np.int32), np.empty(0))


class Choice(Protocol):
    """columns: the further columns of its lists, with the value of each where popularity ranks."""

    @property
    def columns(self) -> Mapping[str, Any]: ...

    def candidates(self, users: Sequence[str]) -> list[I32 | None]:
        """What to rank for each user, None for a user who is left out."""
        ...

    def best(self, scorer: CandidateScorer, histories: Sequence[I32], candidates: Sequence[I32]) -> list[UserList]:
        """The best of candidates(), by one scorer."""
        ...


class AnyOf:
    """Implements Choice. The same items for every user: the pool (C,), ascending, of num_items.

    columns: of the scores of members.
    """

    def __init__(self, pool: I32, num_items: int, k: int, *, exclude_seen: bool, columns: Mapping[str, Any]) -> None:
        self.pool, self.num_items, self.k, self.exclude_seen, self.columns = pool, num_items, k, exclude_seen, columns
        self._place = np.full(num_items, -1, dtype=np.int64)  # (I,) of an item in the pool
        self._place[pool] = np.arange(len(pool))

    def candidates(self, users: Sequence[str]) -> list[I32 | None]:
        """As Choice.candidates."""
        return [self.pool] * len(users)

    def best(self, scorer: CandidateScorer, histories: Sequence[I32], candidates: Sequence[I32]) -> list[UserList]:
        """As Choice.best."""
        scored, members = score_with_members(scorer, histories, candidates)
        scores = np.stack(scored).astype(np.float64, copy=False)  # (B, C)
        best = best_of_pool(scores, [self._seen(history) for history in histories], self.k)
        return [_list_of(places, self.pool, scores[user], members, user) for user, places in enumerate(best)]

    def _seen(self, history: I32) -> I64:
        if not self.exclude_seen:
            return np.empty(0, dtype=np.int64)
        places = np.unique(self._place[history])
        return places[places >= 0]


class ListOf:
    """Implements Choice. A list of candidates for each user, of which those in the pool may be recommended.

    All of a list are scored, since a prompt may show them; then some are left out.
    """

    def __init__(self, pool: AnyOf, lists: Lists) -> None:
        self._lists, self._k, self._exclude_seen, self.columns = lists, pool.k, pool.exclude_seen, pool.columns
        self._allowed = np.zeros(pool.num_items, dtype=bool)
        self._allowed[pool.pool] = True

    def candidates(self, users: Sequence[str]) -> list[I32 | None]:
        """As Choice.candidates."""
        return self._lists.of(users)

    def best(self, scorer: CandidateScorer, histories: Sequence[I32], candidates: Sequence[I32]) -> list[UserList]:
        """As Choice.best."""
        best = [NO_ITEMS] * len(candidates)
        filled = [place for place, items in enumerate(candidates) if len(items)]
        if not filled:
            return best
        scored, members = score_with_members(
            scorer, [histories[place] for place in filled], [candidates[place] for place in filled]
        )
        for number, place in enumerate(filled):
            items, scores = candidates[place], scored[number]
            kept = self._allowed[items]
            if self._exclude_seen:
                kept &= ~np.isin(items, histories[place])
            allowed = np.flatnonzero(kept)
            places = allowed[best_of(items[allowed], scores[allowed], self._k)]
            best[place] = _list_of(places, items, scores, members, number)
        return best


@dataclass(frozen=True)
class SearchSettings:
    """How to search a catalogue: as in ranking.search.Search.top_k. beam: if it is below top_k, top_k counts."""

    exact: bool
    beam: int
    max_rows: int | None


class Searched:
    """Implements Choice. The pool, searched with a SearchScorer; other scorers score all of it.

    columns: what a search says of itself, and those of the pool. Popularity compares all items and runs no model.
    """

    def __init__(self, pool: AnyOf, settings: SearchSettings) -> None:
        self._pool, self._settings = pool, settings
        self.columns: Mapping[str, Any] = {"certified": True, "rows_scored": 0, **pool.columns}
        self._prior = np.full(pool.num_items, -np.inf)  # (I,)
        self._prior[pool.pool] = 0.0

    def candidates(self, users: Sequence[str]) -> list[I32 | None]:
        """As Choice.candidates."""
        return self._pool.candidates(users)

    def best(self, scorer: CandidateScorer, histories: Sequence[I32], candidates: Sequence[I32]) -> list[UserList]:
        """As Choice.best."""
        if not isinstance(scorer, SearchScorer):
            return self._pool.best(scorer, histories, candidates)
        return [self._search(scorer, history) for history in histories]

    def _search(self, scorer: SearchScorer, history: I32) -> UserList:
        prior, settings, k = self._prior.copy(), self._settings, self._pool.k
        if self._pool.exclude_seen:
            prior[history] = -np.inf
        search = scorer.search(history, prior=prior)
        found = search.top_k(k, beam=max(k, settings.beam), max_rows=settings.max_rows, exact=settings.exact)
        num = len(found.items)
        more = {"certified": np.full(num, found.certified), "rows_scored": np.full(num, found.rows)}
        if isinstance(scorer, MemberScorer) and num:
            more |= _columns(scorer.score_members([history], [found.items]), 0)
        return UserList(found.items, found.scores, more)


def member_columns(scorer: CandidateScorer) -> Mapping[str, Any]:
    """The columns for the members of a scorer, if it has any, with no value."""
    return {_column(name): np.nan for name in scorer.members} if isinstance(scorer, MemberScorer) else {}


def _list_of(places: I64, items: I32, scores: Floats, members: Mapping[str, Sequence[Floats]], user: int) -> UserList:
    """The list of the items (C,) with scores (C,) at some places. members: as in score_with_members, for each user."""
    more = {name: values[places] for name, values in _columns(members, user).items()}
    return UserList(items[places], scores[places].astype(np.float64, copy=False), more)


def _columns(members: Mapping[str, Sequence[Floats]], user: int) -> dict[str, Floats]:
    return {_column(name): values[user] for name, values in members.items()}


def _column(member: str) -> str:
    return f"score_{member}"
