"""Steps whose loss or gradient is not finite: every rank leaves them out, the log names their users, and too many end the run.

A single overflow in days of training should not cost the run, and a run that has diverged should not go on for days.
This costs nothing while all numbers are finite, since the loop reduces them over the ranks anyway.
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
    """Whether a step with these numbers is left out: the same answer on every rank, since both numbers are over all ranks."""
    return not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"]))


def suspects(task: Task, plan: StepWork, spoiled: Sequence[int]) -> list[int]:
    """The numbers of the users in the micro-batches, of all ranks, whose own loss is not finite.

    All users of the step if only its gradient is not finite. A collective. spoiled: the numbers of this rank's micro-batches with
    such a loss.
    """
    found = {
        example for part in collectives.gather([u for number in spoiled for u in plan.micro_batches[number]]) for example in part
    }
    indices, _ = task.sampler.examples_of_step(plan.step)
    return task.data.users(indices[sorted(found)] if found else indices)


class BadSteps:
    """Counts bad steps in a row. limit: so many are left out, and one more raises.

    in_a_row: the bad steps just before the first step of this attempt.
    """

    def __init__(self, limit: int, in_a_row: int = 0) -> None:
        self._limit, self._in_a_row = limit, in_a_row

    def good(self) -> None:
        """Note a step that was applied."""
        self._in_a_row = 0

    def row(self, plan: StepWork, numbers: dict[str, float], users: list[int]) -> dict[str, Any]:
        """Note a step that was left out; returns its row for metrics.jsonl. JSON knows no NaN, so such numbers are text."""
        self._in_a_row += 1
        shown = {key: numbers[key] if math.isfinite(numbers[key]) else str(numbers[key]) for key in ("loss", "grad_norm", "lr")}
        place = {"event": "bad_step", "step": plan.step + 1, "epoch": plan.epoch}
        return {**place, **shown, "in_a_row": self._in_a_row, "num_users": len(users), "users": users[:_KEPT]}

    def check(self, row: dict[str, Any]) -> None:
        """Raises NotFiniteError, on every rank, when there were too many. row: of the last one."""
        if self._in_a_row > self._limit:
            raise NotFiniteError(
                f"{describe(row)}; {self._in_a_row} such step(s) in a row, and train.max_bad_steps is {self._limit}; lower "
                "optimizer.lr or task.beta, or look at the data of these users"
            )


def describe(row: dict[str, Any]) -> str:
    """Describe a bad step's row in one line."""
    users, more = row["users"][:_NAMED], row["num_users"] - min(_NAMED, len(row["users"]))
    names = f"{', '.join(map(str, users))}{f' and {more} more' if more else ''}"
    return (
        f"step {row['step']} was left out: loss {row['loss']}, gradient norm {row['grad_norm']}; its groups are of the users "
        f"(or rows) number {names}"
    )
