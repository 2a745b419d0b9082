"""Evaluation examples: which users, which targets of each, and which candidates. They are the same for every model.

By default there is one target per user: the last item of the row, with everything before it as history. Candidates are drawn by a
hash of (seed, user, position), never of the target, so all models of a comparison get the same ones.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
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
        candidates = np.setdiff1d(self._catalogue, seen[seen != target]) if len(seen) else self._catalogue
        if len(candidates) < 2:
            raise UserError(
                f"evaluate.num_candidates=all: user {user} has had all {self.num_items} items of the catalogue, so nothing "
                "is left to rank the target against; prepare data with more items"
            )
        return candidates


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
) -> list[EvalExample]:
    """Builds the examples of a split in ascending (user, position) order.

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
    examples = []
    for row in np.flatnonzero(np.isin(rows.user_ids, drawn_users(usable, max_users, seed))).tolist():
        items, user = rows.items_of(row), int(rows.user_ids[row])
        first = len(items) - 1 if targets == "last" else int(rows.first_target[row])
        for position in range(first, len(items)):
            history, target = items[:position], int(items[position])
            if low_rated:
                among = low_rated_candidates(
                    seed=seed,
                    user=user,
                    position=position,
                    target=target,
                    seen=history if exclude_seen else history[:0],
                    low_rated=rows.explicit_negatives_of(row),
                    most=None if num_candidates == "all" else num_candidates,
                )
                if len(among) == 1:  # the user rated these items again, and high
                    continue
            else:
                among = candidates.of(user, position, target, history)
            examples.append(EvalExample(user, position, target, history, among, given=low_rated))
    if not examples:
        raise UserError(
            f"evaluate.negatives=low_rated: no user of the {split} split of {data.location} whom training has not seen rated an item "
            "below data.min_rating within the training part; prepare data with ratings, data.min_rating and "
            "data.split=leave_one_out or global_temporal"
        )
    return examples


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
