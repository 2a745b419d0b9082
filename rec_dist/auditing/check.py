"""What a check is, and what it leaves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rec_dist.auditing.chance import ALPHA
from rec_dist.auditing.questions import Subject

FEWEST_USERS = 20  # an interval over fewer is too narrow; over one it is a point
FINDING, CLEAN, NOT_APPLICABLE = "finding", "clean", "does not apply"
Need = Literal["questions", "data", "model", "language model"]


@dataclass(frozen=True)
class Outcome:
    """measured: what was measured, a sentence each. faults: what is wrong, with the way out; a finding unless empty.

    skipped: why the check does not apply here, None if it does.
    """

    measured: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    skipped: str | None = None

    @staticmethod
    def of_tail(measured: str, fault: str, tail: float) -> "Outcome":
        """A finding, if chance gives as much with a probability (tail) below ALPHA."""
        return Outcome([measured], [] if tail >= ALPHA else [fault])

    @property
    def verdict(self) -> str:
        """FINDING, CLEAN or NOT_APPLICABLE."""
        return NOT_APPLICABLE if self.skipped is not None else FINDING if self.faults else CLEAN

    @property
    def sentences(self) -> list[str]:
        """Everything that a reader should know, the faults first."""
        return [self.skipped] if self.skipped is not None else [*self.faults, *self.measured]


@dataclass(frozen=True)
class Check:
    """One check. needs: what the subject must have. asks: the question that it answers. compares: whether by intervals over users."""

    name: str
    asks: str
    needs: Need
    run: Callable[[Subject], Outcome]
    compares: bool = False

    def outcome(self, subject: Subject) -> Outcome:
        """Runs the check, or says why it does not apply to this subject."""
        model = subject.model
        if self.needs != "questions" and subject.data is None:
            return Outcome(skipped="preference rows name no user, item or time.")
        if self.needs in ("model", "language model") and model is None:
            return Outcome(skipped="a data set alone has no model; give a run directory.")
        if self.needs == "language model" and (model is None or model.base is None):
            return Outcome(skipped="the run has no language model.")
        if self.compares and (num := len(np.unique(subject.questions.users))) < FEWEST_USERS:
            return Outcome(skipped=f"an interval needs {FEWEST_USERS} users, and the questions have {num}.")
        return self.run(subject)
