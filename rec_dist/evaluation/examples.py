"""What is asked of every model alike: which users, which target of each, and which candidates.

One target a user: the last of the row, with all that the user did before it as history. Candidates are drawn by hash of
(seed, user, position), never of the target, so all models of a comparison get the same ones.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.sampling.negatives import draw_candidates
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32
from rec_dist.runtime.rng import hash_u64

_USERS = 11  # its own stream of draws


@dataclass(frozen=True)
class EvalExample:
    """Rank `candidates`, the target among them, for a user with this history (item ids, oldest first)."""

    user_id: int
    position: int
    target: int
    history: I32
    candidates: I32


def build_eval_examples(
    data: PreparedData, *, split: str, num_candidates: int | Literal["all"], max_users: int | None, seed: int
) -> list[EvalExample]:
    """The questions of a split, in ascending user order. Raises UserError for an empty split, too few candidates or items."""
    if num_candidates != "all" and num_candidates < 2:
        raise UserError(f"evaluate.num_candidates ({num_candidates}) must be 2 or more (the target and another), or all")
    rows = data.split(split)
    if not len(rows):
        raise UserError(f"evaluate.split ({split}) of {data.location} has no user")
    chosen = np.arange(len(rows))
    if max_users is not None and max_users < len(rows):
        chosen = np.sort(np.argsort(hash_u64(seed, _USERS, rows.user_ids), kind="stable")[:max_users])
    examples = []
    for row in chosen.tolist():
        items, user = rows.items_of(row), int(rows.user_ids[row])
        position = len(items) - 1
        history, target = items[:position], int(items[position])
        if num_candidates == "all":
            candidates = np.setdiff1d(np.arange(data.num_items, dtype=np.int32), history[history != target])
            if len(candidates) < 2:
                raise UserError(
                    f"evaluate.num_candidates=all: user {user} has had all {data.num_items} items of the catalogue, so that nothing "
                    "is left to rank the target against; prepare data with more items"
                )
        else:
            candidates = draw_candidates(
                seed=seed,
                user=user,
                position=position,
                target=target,
                history=history,
                num=num_candidates,
                num_items=data.num_items,
            )
        examples.append(EvalExample(user, position, target, history, candidates))
    return examples
