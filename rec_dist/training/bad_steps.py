"""Steps whose loss or gradient is not finite: left out on every rank, named, counted, and the end of the run when they go on.

A single overflow in days of training should not cost the run; a run that has diverged should not go on for days. Costs nothing
while all is finite: what is looked at is reduced over the ranks anyway.
"""

import math
from collections.abc import Sequence
from typing import Any

from rec_dist.errors import NotFiniteError
from rec_dist.methods.task import Task
from rec_dist.runtime import collectives
from rec_dist.training.loader import StepWork

_NAMED, _KEPT = 8, 100  # users in a message, and in a row of metrics.jsonl


def is_bad(numbers: dict[str, float]) -> bool:
    """Whether the step was left out; the same on every rank, since both numbers are over all ranks."""
    return not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"]))


def suspects(task: Task, plan: StepWork, spoiled: Sequence[int]) -> list[str]:
    """Users of the micro-batches whose own loss is not finite, of all ranks; of the whole step where the gradient alone is. A collective.

    spoiled: of this rank's micro-batches, the numbers of those with such a loss.
    """
    found = {
        example for part in collectives.gather([u for number in spoiled for u in plan.micro_batches[number]]) for example in part
    }
    indices, _ = task.sampler.examples_of_step(plan.step)
    return task.users(indices[sorted(found)] if found else indices)


class BadSteps:
    """How many in a row. limit: this many are left out, one more raises; in_a_row: those before the first step of this attempt."""

    def __init__(self, limit: int, in_a_row: int = 0) -> None:
        self._limit, self._in_a_row = limit, in_a_row

    def good(self) -> None:
        """A step was applied."""
        self._in_a_row = 0

    def row(self, plan: StepWork, numbers: dict[str, float], users: list[str]) -> dict[str, Any]:
        """A step was left out: its row for metrics.jsonl. JSON knows no NaN, so such numbers are text."""
        self._in_a_row += 1
        shown = {key: numbers[key] if math.isfinite(numbers[key]) else str(numbers[key]) for key in ("loss", "grad_norm", "lr")}
        place = {"event": "bad_step", "step": plan.step + 1, "epoch": plan.epoch}
        return {**place, **shown, "in_a_row": self._in_a_row, "num_users": len(users), "users": users[:_KEPT]}

    def check(self, row: dict[str, Any]) -> None:
        """Raises NotFiniteError, on every rank, when there have been too many; `row` is the last."""
        if self._in_a_row > self._limit:
            raise NotFiniteError(
                f"{describe(row)}; {self._in_a_row} such step(s) in a row, and train.max_bad_steps is {self._limit}; lower "
                "optimizer.lr or task.beta, or look at the data of these users"
            )


def describe(row: dict[str, Any]) -> str:
    """One line of a bad step's row."""
    users, more = row["users"][:_NAMED], row["num_users"] - min(_NAMED, len(row["users"]))
    names = f"{', '.join(users)}{f' and {more} more' if more else ''}"
    return (
        f"step {row['step']} was left out: loss {row['loss']}, gradient norm {row['grad_norm']}; its groups are of users {names}"
    )
