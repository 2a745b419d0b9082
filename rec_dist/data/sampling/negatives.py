"""Draws items that a user did not choose: training negatives and evaluation candidates.

Every draw is a pure function of (seed, epoch, user, position). It never depends on the rank, the worker or the target, which is
only left out. The lists that S-DPO released were seeded by the target, so a lookup without a model scored HR@1 0.62 on them.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from rec_dist.data.sampling.many_draws import SeenItems, draw_outside
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32, I64
from rec_dist.runtime.rng import hash_u64, uniform

_NEGATIVES, _CANDIDATES, _SHUFFLE, _EXPLICIT_NEGATIVES, _LOW_RATED = 1, 2, 3, 4, 5  # each use has its own stream of draws


class ListsOfTargets(Protocol):
    """Items for each training target, as in data/artifacts/hard_negatives.py."""

    def of(self, user: int, position: int) -> I32: ...


@dataclass(frozen=True)
class NegativeSampler:
    """Draws K negatives per target.

    kind: uniform, popularity (train_count ** power), low_rated (the user's explicit negatives first, then uniform) or model (the
    target's list in `lists` first, then uniform).
    num: K. seed: the seed of all draws. train_counts (I,) int64: the positives of each item in the training part.
    held_out: items that no user of the train split has met (data.cold_items_fraction) and that are never drawn.
    """

    kind: Literal["uniform", "popularity", "low_rated", "model"]
    num: int
    seed: int
    train_counts: I64
    power: float = 1.0
    held_out: I32 = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    lists: ListsOfTargets | None = None

    @property
    def one_by_one(self) -> bool:
        """Whether draw_many() cannot be used."""
        return self.kind in ("low_rated", "model")

    def draw(self, *, epoch: int, user: int, position: int, seen: I32, explicit_negatives: I32) -> I32:
        """(K,) distinct items outside `seen`, which holds the user's history and the target.

        Raises UserError if the catalogue has fewer than K items left.
        """
        if self.num == 0:
            return np.empty(0, dtype=np.int32)
        chosen = np.empty(0, dtype=np.int32)
        seen = np.concatenate([seen, self.held_out])
        if self.one_by_one:
            assert self.kind == "low_rated" or self.lists is not None
            preferred = explicit_negatives if self.lists is None else self.lists.of(user, position)
            usable = np.setdiff1d(preferred, seen)
            order = np.argsort(hash_u64(self.seed, _EXPLICIT_NEGATIVES, epoch, user, position, usable), kind="stable")
            chosen = usable[order][: self.num].astype(np.int32)
            seen = np.concatenate([seen, chosen])
        cumulative = self._cumulative if self.kind == "popularity" else None
        keys = (self.seed, _NEGATIVES, epoch, user, position)
        rest = _draw_outside(keys, len(self.train_counts), self.num - len(chosen), seen, cumulative, key="negatives.num")
        return np.concatenate([chosen, rest])

    def draw_many(self, *, epochs: I64, users: I64, positions: I64, seen: SeenItems, rows: I64, counts: I64) -> I32:
        """Does what draw() does for n targets at once: (n, K). Not where one_by_one.

        epochs, users, positions (n,). Target j has seen the first counts[j] items of row rows[j] of `seen`.
        """
        assert not self.one_by_one
        keys = (self.seed, _NEGATIVES, epochs, users, positions)
        cumulative = self._cumulative if self.kind == "popularity" else None
        picked, whole = draw_outside(keys, self.num, seen, rows, counts, cumulative, self.held_out)
        for j in np.flatnonzero(~whole).tolist():
            own = seen.first(int(rows[j]), int(counts[j]))
            epoch, user, position = int(epochs[j]), int(users[j]), int(positions[j])
            picked[j] = self.draw(epoch=epoch, user=user, position=position, seen=own, explicit_negatives=own[:0])
        return picked

    @cached_property
    def _cumulative(self) -> npt.NDArray[np.float64]:
        weights = self.train_counts.astype(np.float64) ** self.power
        cumulative: npt.NDArray[np.float64] = np.cumsum(weights) / max(weights.sum(), 1e-300)
        return cumulative


def draw_candidates(*, seed: int, user: int, position: int, target: int, history: I32, num: int, num_items: int) -> I32:
    """Draws (num,) candidates in shuffled order: the target, and num - 1 uniform items outside history and target.

    Raises UserError if the catalogue is too small.
    """
    seen = np.append(history, np.int32(target)).astype(np.int32)
    others = _draw_outside((seed, _CANDIDATES, user, position), num_items, num - 1, seen, None, key="evaluate.num_candidates")
    place = int(hash_u64(seed, _SHUFFLE, user, position) % np.uint64(num))
    return np.insert(others, place, np.int32(target)).astype(np.int32)


def low_rated_candidates(*, seed: int, user: int, position: int, target: int, seen: I32, low_rated: I32, most: int | None) -> I32:
    """(C,) candidates: the target, and items of `low_rated` outside `seen`, most - 1 of them by hash (None: all), in hashed order.

    C is 1 where no such item is left.
    """
    others = np.setdiff1d(low_rated, np.append(seen, np.int32(target)))
    order = np.argsort(hash_u64(seed, _LOW_RATED, user, position, others), kind="stable")
    others = others[order][: None if most is None else most - 1]
    place = int(hash_u64(seed, _SHUFFLE, user, position) % np.uint64(len(others) + 1))
    return np.insert(others, place, np.int32(target)).astype(np.int32)


def draw_many_candidates(*, seeds: I64, users: I64, positions: I64, seen: SeenItems, rows: I64, num: int) -> I32:
    """Does what draw_candidates() does for n targets at once: (n, num).

    seeds, users, positions (n,). Target j is the item at positions[j] of row rows[j] of `seen`; those before it are its history.
    """
    targets = seen.items[seen.offsets[rows] + positions]
    others, whole = draw_outside((seeds, _CANDIDATES, users, positions), num - 1, seen, rows, positions + 1, None, seen.items[:0])
    places = (hash_u64(seeds, _SHUFFLE, users, positions) % np.uint64(num)).astype(np.int64)
    columns = np.arange(num)
    result = np.empty((len(rows), num), dtype=np.int32)
    result[columns != places[:, None]] = others.reshape(-1)
    result[columns == places[:, None]] = targets
    for j in np.flatnonzero(~whole).tolist():
        history = seen.first(int(rows[j]), int(positions[j]))
        key = {"seed": int(seeds[j]), "user": int(users[j]), "position": int(positions[j])}
        result[j] = draw_candidates(**key, target=int(targets[j]), history=history, num=num, num_items=seen.num_items)
    return result


def _draw_outside(
    keys: tuple[int, ...], num_items: int, num: int, seen: I32, cumulative: npt.NDArray[np.float64] | None, *, key: str
) -> I32:
    """Draws `num` distinct items outside `seen`, by rejection in one vectorised draw, or by hashed order if few are left."""
    blocked = np.unique(seen)
    if num > num_items - len(blocked):
        raise UserError(
            f"{key} asks for {num} items outside a user's history, but the catalogue of {num_items} has only "
            f"{num_items - len(blocked)} left (user {keys[-2]}, position {keys[-1]}); lower {key}"
        )
    if num <= 0:
        return np.empty(0, dtype=np.int32)
    if (num + len(blocked)) * 2 < num_items:
        counter = np.arange(4 * num + 16)
        draws = uniform(*keys, counter)
        items = (
            np.searchsorted(cumulative, draws, side="right") if cumulative is not None else (draws * num_items).astype(np.int64)
        )
        items = items[(items < num_items) & ~np.isin(items, blocked)]
        _, first = np.unique(items, return_index=True)
        picked = items[np.sort(first)][:num]
        if len(picked) == num:
            return picked.astype(np.int32)
    return _draw_by_order(keys, num_items, num, blocked, cumulative)


def _draw_by_order(
    keys: tuple[int, ...], num_items: int, num: int, blocked: I32, cumulative: npt.NDArray[np.float64] | None
) -> I32:
    """Weighted sampling without replacement by exponential keys (Efraimidis and Spirakis, 2006) over the whole catalogue."""
    free = np.setdiff1d(np.arange(num_items, dtype=np.int32), blocked, assume_unique=False)
    draws = np.maximum(uniform(*keys, -1, free), 1e-300)
    weights = np.ones(len(free)) if cumulative is None else np.maximum(np.diff(cumulative, prepend=0.0)[free], 1e-12)
    return free[np.argsort(-np.log(draws) / weights, kind="stable")][:num]
