"""Evaluation examples: which users, which targets of each, and which candidates. They are the same for every model.

By default there is one target per user: the last item of the row, with everything before it as history. Candidates are drawn by a
hash of (seed, user, position), never of the target, so all models of a comparison get the same ones.

N examples. They are made when they are asked for: 24 bytes of each are held, whatever the number of candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.dataset.ragged import runs
from rec_dist.data.sampling.negatives import draw_candidates, low_rated_candidates
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32, I64
from rec_dist.runtime.rng import hash_u64

_USERS = 11  # a stream of draws of its own


@dataclass(frozen=True)
class EvalExample:
    """One ranking: a user's history (item ids, oldest first), and candidates, which include the target.

    position: the target's place in the user's row, or the number of the question. (user_id, position) is unique.
    given: whether the number of candidates is the question's own: they stood in a file, or the user rated them low.
    """

    user_id: int
    position: int
    target: int
    history: I32
    candidates: I32
    given: bool = False


class EvalExamples(Sequence[EvalExample]):
    """N examples, each made by make(n) whenever it is asked for. users (N,): of each."""

    def __init__(self, users: I64, make: Callable[[int], EvalExample]) -> None:
        self.users, self._make = users, make

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, number: Any) -> Any:
        """One example. Raises IndexError beyond the last."""
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self._make(number % len(self))

    def __iter__(self) -> Iterator[EvalExample]:
        return map(self._make, range(len(self)))

    def check_candidates(self, candidates: "Candidates", history_lengths: I64) -> "EvalExamples":
        """Raises UserError if the catalogue has too few items for one of them. history_lengths (N,). Returns itself.

        Makes only the examples whose history might leave too few.
        """
        for number in np.flatnonzero(history_lengths >= candidates.spare).tolist():
            self[number]
        return self


@dataclass(frozen=True)
class Candidates:
    """How candidates are chosen (evaluate.num_candidates, evaluate.exclude_seen).

    exclude_seen: none of them is in the history, except for the target itself. Otherwise the history's items are candidates like
    all others. Raises UserError if num_candidates is 1 or less.
    """

    num_items: int
    num: int | Literal["all"]
    exclude_seen: bool
    seed: int

    def __post_init__(self) -> None:
        if self.num != "all" and self.num < 2:
            raise UserError(f"evaluate.num_candidates ({self.num}) must be 2 or more (the target and another), or all")

    @property
    def spare(self) -> int:
        """A history of fewer items always leaves enough."""
        return self.num_items - (1 if self.num == "all" else self.num - 1)

    @cached_property
    def _catalogue(self) -> I32:
        return np.arange(self.num_items, dtype=np.int32)

    def of(self, user: int, position: int, target: int, history: I32) -> I32:
        """The candidates of one target: (C,). Raises UserError if the catalogue has too few items."""
        seen = history if self.exclude_seen else history[:0]
        if self.num != "all":
            return draw_candidates(
                seed=self.seed,
                user=user,
                position=position,
                target=target,
                history=seen,
                num=self.num,
                num_items=self.num_items,
            )
        candidates = self._catalogue
        if len(seen):
            kept = np.ones(self.num_items, dtype=bool)
            kept[seen], kept[target] = False, True
            candidates = np.flatnonzero(kept).astype(np.int32)
        if len(candidates) < 2:
            raise UserError(
                f"evaluate.num_candidates=all: user {user} has had all {self.num_items} items of the catalogue, so nothing "
                "is left to rank the target against; prepare data with more items"
            )
        return candidates

    def low_rated(self, user: int, position: int, target: int, seen: I32, disliked: I32) -> I32:
        """The target and items that its user rated low, without those in `seen`: (C,), of which C may be 1."""
        return low_rated_candidates(
            seed=self.seed,
            user=user,
            position=position,
            target=target,
            seen=seen,
            low_rated=disliked,
            most=None if self.num == "all" else self.num,
        )


def build_eval_examples(
    data: PreparedData,
    *,
    split: str,
    num_candidates: int | Literal["all"],
    max_users: int | None,
    seed: int,
    exclude_seen: bool = True,
    targets: Literal["last", "all"] = "last",
    low_rated: bool = False,
) -> EvalExamples:
    """The examples of a split in ascending (user, position) order.

    targets: the last target of each row, or all of them, each after everything before it. low_rated: a target's other candidates
    are items that its user rated low (evaluate.negatives). Raises UserError for an empty split, too few items, or no user with an
    item rated low.
    """
    candidates = Candidates(data.num_items, num_candidates, exclude_seen=exclude_seen, seed=seed)
    rows = data.split(split)
    if not len(rows):
        raise UserError(
            f"evaluate.split ({split}) of {data.location} has no user; choose another split, or prepare data whose split has one"
        )
    usable = low_rated_users(data, rows) if low_rated else rows.user_ids
    asked = np.flatnonzero(np.isin(rows.user_ids, drawn_users(usable, max_users, seed)))
    lengths = np.diff(rows.offsets)[asked]
    first = lengths - 1 if targets == "last" else rows.first_target[asked].astype(np.int64)
    row_of = np.repeat(asked, lengths - first)  # (N,)
    positions = runs(first, lengths - first)  # (N,)

    def make(number: int) -> EvalExample:
        row, position = int(row_of[number]), int(positions[number])
        user, items = int(rows.user_ids[row]), rows.items_of(row)
        history, target = items[:position], int(items[position])
        if low_rated:
            seen, disliked = history if exclude_seen else history[:0], rows.explicit_negatives_of(row)
            among = candidates.low_rated(user, position, target, seen, disliked)
        else:
            among = candidates.of(user, position, target, history)
        return EvalExample(user, position, target, history, among, given=low_rated)

    if not low_rated:
        return EvalExamples(rows.user_ids[row_of], make).check_candidates(candidates, positions)
    # A user who rated these items again, and high, has none left.
    askable = np.array([len(make(number).candidates) > 1 for number in range(len(row_of))], dtype=bool)
    if not askable.any():
        raise UserError(
            f"evaluate.negatives=low_rated: no user of the {split} split of {data.location} whom training has not seen rated an item "
            "below data.min_rating within the training part; prepare data with ratings, data.min_rating and "
            "data.split=leave_one_out or global_temporal"
        )
    row_of, positions = row_of[askable], positions[askable]
    return EvalExamples(rows.user_ids[row_of], make)


def low_rated_users(data: PreparedData, rows: SequenceSplit) -> I64:
    """The users of `rows` who can be asked about items that they rated low, in no order.

    Those of the train split cannot if it holds few users (data.max_train_users): what they rated low may be their negatives there.
    With all users in training nobody would be left, so then all are asked.
    """
    some = rows.user_ids[np.diff(rows.explicit_negative_offsets) > 0]
    return np.setdiff1d(some, data.split("train").user_ids) if data.manifest.settings.get("max_train_users") else some


def drawn_users(users: I64, max_users: int | None, seed: int) -> I64:
    """max_users of `users` (U,), drawn by hash, in no order; all of them for None. Fewer users are a part of more."""
    if max_users is None or max_users >= len(users):
        return users
    return users[np.argsort(hash_u64(seed, _USERS, users), kind="stable")[:max_users]]
