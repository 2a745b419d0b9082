"""Recommendations from any scorer, a block of users at a time.

A block has as many users as fit PAIRS scores, at any size of the catalogue, so no matrix of users x items is ever built. Blocks
begin at multiples of their size, so a ranking that was stopped and continued scores the same users together, and its scores are
the same to the last bit.

B users of a block, C candidates of a user, I items of the catalogue, k items of a list.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rec_dist.evaluation.baselines import CandidateScorer, Floats, PopularityScorer
from rec_dist.ranking.candidates import CandidateLists, Lists
from rec_dist.ranking.choice import NO_ITEMS, AnyOf, Choice, Column, ListOf, Searched, SearchSettings, member_columns
from rec_dist.ranking.users import UserBlock, Users
from rec_dist.runtime.arrays import I32, I64

PAIRS = 1 << 22  # scores of a block: 32 MiB of float64, and about four times that while they are made and selected
TITLES = 1 << 11  # that a language model reads for a block: some 20 s of work between two reports
MOST_USERS = 4096


@dataclass(frozen=True)
class Wanted:
    """What a list may hold. pool (C,): ascending items that may be recommended, of num_items.

    candidates: each user's own, None for the pool. exclude_seen: leaves out the items of the history. search: searches the pool
    with a SearchScorer, None to score all of it.
    """

    pool: I32
    num_items: int
    top_k: int
    exclude_seen: bool
    candidates: CandidateLists | None = None
    search: SearchSettings | None = None

    @property
    def longest(self) -> int:
        """The most items that are ranked for a user."""
        return len(self.pool) if self.candidates is None else self.candidates.longest

    def block_size(self, titles: int) -> int:
        """Users of a block. titles: that a language model reads for each, 0 without one."""
        return max(1, min(MOST_USERS, PAIRS // self.longest, TITLES // titles if titles else MOST_USERS))


@dataclass(frozen=True)
class Counts:
    """What a log says of ranked users. users: with or without a list. unknown: names in histories that are no item.

    fallback: users without a known item, who got the popularity order. without_candidates: users without a list of candidates,
    who are not ranked. empty: users for whom nothing is left to recommend. uncertified: users whose list a search may have missed
    an item of.
    """

    users: int = 0
    unknown: int = 0
    fallback: int = 0
    without_candidates: int = 0
    empty: int = 0
    uncertified: int = 0

    def plus(self, other: "Counts") -> "Counts":
        """The sums."""
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Ranked:
    """The lists of a block of users, one below another: N rows. users[user[n]] has item[n] at rank[n], from 1, with score[n].

    fallback (N,): whether the list is in the order of popularity. more: further columns (N,) by name.
    """

    users: list[str]
    user: I64
    rank: I32
    item: I32
    score: Floats
    fallback: npt.NDArray[np.bool_]
    more: Mapping[str, Column]
    counts: Counts


def rank_users(
    users: Users, scorer: CandidateScorer, popularity: PopularityScorer, wanted: Wanted, *, size: int, start: int = 0
) -> Iterator[Ranked]:
    """The lists of all users from `start` on, a multiple of `size`, in blocks of `size` users."""
    chosen = _choice(wanted, wanted.candidates, scorer)
    for block in users.blocks(size, start):
        yield _rank_block(block, scorer, popularity, chosen)


def rank_block(
    block: UserBlock, lists: Lists | None, scorer: CandidateScorer, popularity: PopularityScorer, wanted: Wanted
) -> Ranked:
    """The lists of one block, as rank_users gives them. lists: in the place of wanted.candidates."""
    return _rank_block(block, scorer, popularity, _choice(wanted, lists, scorer))


def _choice(wanted: Wanted, lists: Lists | None, scorer: CandidateScorer) -> Choice:
    pool = AnyOf(wanted.pool, wanted.num_items, wanted.top_k, exclude_seen=wanted.exclude_seen, columns=member_columns(scorer))
    if wanted.search is not None:
        return Searched(pool, wanted.search)
    return pool if lists is None else ListOf(pool, lists)


def _rank_block(block: UserBlock, scorer: CandidateScorer, popularity: PopularityScorer, chosen: Choice) -> Ranked:
    best = [NO_ITEMS] * len(block.users)
    listed = [(number, items) for number, items in enumerate(chosen.candidates(block.users)) if items is not None]
    known = [pair for pair in listed if len(block.histories[pair[0]])]
    others = [pair for pair in listed if not len(block.histories[pair[0]])]
    for by, pairs in ((scorer, known), (popularity, others)):
        if pairs:
            found = chosen.best(by, [block.histories[number] for number, _ in pairs], [items for _, items in pairs])
            for (number, _), one in zip(pairs, found, strict=True):
                best[number] = one
    lengths = np.asarray([len(one.items) for one in best], dtype=np.int64)  # (B,)
    user = np.repeat(np.arange(len(best)), lengths)  # (N,)
    fallback = np.zeros(len(best), dtype=bool)
    fallback[[number for number, _ in others]] = True
    counts = Counts(
        users=len(best),
        unknown=block.unknown,
        fallback=len(others),
        without_candidates=len(best) - len(listed),
        empty=sum(not lengths[number] for number, _ in listed),
        uncertified=sum(not one.more.get("certified", np.ones(1)).all() for one in best),
    )
    return Ranked(
        users=block.users,
        user=user,
        rank=(np.arange(len(user)) - (np.cumsum(lengths) - lengths)[user] + 1).astype(np.int32),
        item=np.concatenate([one.items for one in best]),
        score=np.concatenate([one.scores for one in best]),
        fallback=fallback[user],
        more={
            name: np.concatenate([one.more.get(name, np.full(len(one.items), missing)) for one in best])
            for name, missing in chosen.columns.items()
        },
        counts=counts,
    )
