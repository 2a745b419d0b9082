"""Recommendations from any scorer, a block of users at a time.

A block has as many users as fit PAIRS scores, at any size of the catalogue, so no matrix of users x items is ever built. Blocks
begin at multiples of their size, so a ranking that was stopped and continued scores the same users together, and its scores are
the same to the last bit.

B users of a block, C candidates of a user, I items of the catalogue, k items of a list.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rec_dist.evaluation.baselines import CandidateScorer, Floats, PopularityScorer
from rec_dist.ranking.candidates import CandidateLists
from rec_dist.ranking.selection import Best, best_of, best_of_pool
from rec_dist.ranking.users import UserBlock, Users
from rec_dist.runtime.arrays import I32, I64

PAIRS = 1 << 22  # scores of a block: 32 MiB of float64, and about four times that while they are made and selected
SLOW_PAIRS = 1 << 11  # for a language model: some 20 s of work between two reports
MOST_USERS = 4096


@dataclass(frozen=True)
class Wanted:
    """What a list may hold. pool (C,): ascending items that may be recommended, of num_items.

    candidates: each user's own, None for the pool. exclude_seen: leaves out the items of the history.
    """

    pool: I32
    num_items: int
    top_k: int
    exclude_seen: bool
    candidates: CandidateLists | None = None

    def block_size(self, *, slow: bool) -> int:
        """Users of a block. slow: for a scorer that takes milliseconds a score."""
        longest = len(self.pool) if self.candidates is None else self.candidates.longest
        return max(1, min(MOST_USERS, (SLOW_PAIRS if slow else PAIRS) // longest))


@dataclass(frozen=True)
class Counts:
    """What a log says of ranked users. users: with or without a list. unknown: names in histories that are no item.

    fallback: users without a known item, who got the popularity order. without_candidates: users without a list of candidates,
    who are not ranked. empty: users for whom nothing is left to recommend.
    """

    users: int = 0
    unknown: int = 0
    fallback: int = 0
    without_candidates: int = 0
    empty: int = 0

    def plus(self, other: "Counts") -> "Counts":
        """The sums."""
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Ranked:
    """The lists of a block of users, one below another: N rows. users[user[n]] has item[n] at rank[n], from 1, with score[n].

    fallback (N,): whether the list is in the order of popularity.
    """

    users: list[str]
    user: I64
    rank: I32
    item: I32
    score: Floats
    fallback: npt.NDArray[np.bool_]
    counts: Counts


def rank_users(
    users: Users, scorer: CandidateScorer, popularity: PopularityScorer, wanted: Wanted, *, size: int, start: int = 0
) -> Iterator[Ranked]:
    """The lists of all users from `start` on, a multiple of `size`, in blocks of `size` users."""
    chosen = _Pool(wanted) if wanted.candidates is None else _Lists(wanted, wanted.candidates)
    for block in users.blocks(size, start):
        yield _rank_block(block, scorer, popularity, chosen)


def _rank_block(block: UserBlock, scorer: CandidateScorer, popularity: PopularityScorer, chosen: "_Pool | _Lists") -> Ranked:
    best: list[Best] = [_NOTHING] * len(block.users)
    listed = [(number, items) for number, items in enumerate(chosen.candidates(block.users)) if items is not None]
    known = [pair for pair in listed if len(block.histories[pair[0]])]
    others = [pair for pair in listed if not len(block.histories[pair[0]])]
    for by, pairs in ((scorer, known), (popularity, others)):
        if pairs:
            found = chosen.best(by, [block.histories[number] for number, _ in pairs], [items for _, items in pairs])
            for (number, _), one in zip(pairs, found, strict=True):
                best[number] = one
    lengths = np.asarray([len(items) for items, _ in best], dtype=np.int64)  # (B,)
    user = np.repeat(np.arange(len(best)), lengths)  # (N,)
    fallback = np.zeros(len(best), dtype=bool)
    fallback[[number for number, _ in others]] = True
    counts = Counts(
        users=len(best),
        unknown=block.unknown,
        fallback=len(others),
        without_candidates=len(best) - len(listed),
        empty=sum(not lengths[number] for number, _ in listed),
    )
    return Ranked(
        users=block.users,
        user=user,
        rank=(np.arange(len(user)) - (np.cumsum(lengths) - lengths)[user] + 1).astype(np.int32),
        item=np.concatenate([items for items, _ in best]),
        score=np.concatenate([scores for _, scores in best]),
        fallback=fallback[user],
        counts=counts,
    )


_NOTHING: Best = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float64))


class _Pool:
    """The same candidates for every user: the catalogue, or what allow and deny lists leave of it."""

    def __init__(self, wanted: Wanted) -> None:
        self._pool, self._k, self._exclude_seen = wanted.pool, wanted.top_k, wanted.exclude_seen
        self._place = np.full(wanted.num_items, -1, dtype=np.int64)  # (I,) of an item in the pool
        self._place[wanted.pool] = np.arange(len(wanted.pool))

    def candidates(self, users: Sequence[str]) -> list[I32 | None]:
        return [self._pool] * len(users)

    def best(self, scorer: CandidateScorer, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Best]:
        scores = np.stack(scorer.score(histories, candidates)).astype(np.float64, copy=False)  # (B, C)
        return best_of_pool(self._pool, scores, [self._seen(history) for history in histories], self._k)

    def _seen(self, history: I32) -> I64:
        if not self._exclude_seen:
            return np.empty(0, dtype=np.int64)
        places = np.unique(self._place[history])
        return places[places >= 0]


class _Lists:
    """A list of candidates for each user. All of a list are scored, since a prompt may show them; then some are left out."""

    def __init__(self, wanted: Wanted, lists: CandidateLists) -> None:
        self._lists, self._k, self._exclude_seen = lists, wanted.top_k, wanted.exclude_seen
        self._allowed = np.zeros(wanted.num_items, dtype=bool)
        self._allowed[wanted.pool] = True

    def candidates(self, users: Sequence[str]) -> list[I32 | None]:
        return self._lists.of(users)

    def best(self, scorer: CandidateScorer, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Best]:
        found: list[Best] = []
        filled = [place for place, items in enumerate(candidates) if len(items)]
        scored = scorer.score([histories[place] for place in filled], [candidates[place] for place in filled]) if filled else []
        scores = dict(zip(filled, scored, strict=True))
        for place, (history, items) in enumerate(zip(histories, candidates, strict=True)):
            if place not in scores:
                found.append(_NOTHING)
                continue
            kept = self._allowed[items]
            if self._exclude_seen:
                kept &= ~np.isin(items, history)
            found.append(best_of(items[kept], scores[place][kept], self._k))
        return found
