"""Runs the checks on a subject, and shows what they found: a table of text, and one HTML page."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rec_dist.auditing.check import CLEAN, FINDING, NOT_APPLICABLE, Check, Outcome
from rec_dist.auditing.checks.baselines import BASELINES
from rec_dist.auditing.checks.candidates import CANDIDATES
from rec_dist.auditing.checks.cold import COLD
from rec_dist.auditing.checks.concentration import CONCENTRATION
from rec_dist.auditing.checks.copied import COPIED
from rec_dist.auditing.checks.duplicates import DUPLICATES
from rec_dist.auditing.checks.later import LATER
from rec_dist.auditing.checks.memorised import MEMORISED
from rec_dist.auditing.checks.order import ORDER
from rec_dist.auditing.checks.position import POSITION
from rec_dist.auditing.questions import Subject
from rec_dist.errors import UserError
from rec_dist.report.render import render
from rec_dist.report.table import Cell, Table
from rec_dist.report.text_table import align
from rec_dist.runtime.messages import visible
from rec_dist.storage.files import write_text

CHECKS: tuple[Check, ...] = (
    CANDIDATES,
    POSITION,
    LATER,
    DUPLICATES,
    COPIED,
    BASELINES,
    COLD,
    ORDER,
    CONCENTRATION,
    MEMORISED,
)
_WIDTH = 88  # of a sentence in the table of text
HEADER = ("check", "verdict", "what was measured")


@dataclass(frozen=True)
class Audit:
    """What was audited, and the outcome of each check by its name, in the order in which they ran. asked: the questions, in words.

    >>> Audit("data/x", "9 questions", {"position": Outcome(["..."])}).clean
    True
    """

    target: str
    asked: str
    outcomes: dict[str, Outcome]

    @property
    def findings(self) -> dict[str, list[str]]:
        """The faults of each check that found some, by its name."""
        return {name: outcome.faults for name, outcome in self.outcomes.items() if outcome.verdict == FINDING}

    @property
    def clean(self) -> bool:
        """Whether no check found a fault."""
        return not self.findings

    @property
    def summary(self) -> str:
        """The number of findings and of checks, as a sentence."""
        counts = {
            verdict: sum(outcome.verdict == verdict for outcome in self.outcomes.values())
            for verdict in (FINDING, CLEAN, NOT_APPLICABLE)
        }
        findings = f"{counts[FINDING]} {'check' if counts[FINDING] == 1 else 'checks'} found a fault"
        return f"{findings}, {counts[CLEAN]} found none, {counts[NOT_APPLICABLE]} did not apply."

    def __str__(self) -> str:
        """The table of text that the command prints."""
        grid = [list(HEADER)]
        for name, outcome in self.outcomes.items():
            lines = [line for sentence in outcome.sentences for line in textwrap.wrap(visible(sentence), _WIDTH)]
            grid.append([name, outcome.verdict, lines[0]])
            grid += [["", "", line] for line in lines[1:]]
        return "\n".join([*align(grid), "", f"{visible(self.asked)}: {self.summary}"])

    def write_page(self, path: Path) -> None:
        """Writes the page, which opens from disk and fetches nothing, whole or not at all."""
        asked = {check.name: check.asks for check in CHECKS}
        rows = [
            [Cell(name), Cell(outcome.verdict), Cell(" ".join([asked[name], *outcome.sentences]))]
            for name, outcome in self.outcomes.items()
        ]
        faults = [f"{name}: {fault}" for name, found in self.findings.items() for fault in found]
        write_text(
            path,
            render(
                "audit.html.j2",
                target=self.target,
                asked=self.asked,
                summary_line=self.summary,
                faults=faults,
                checks=Table(HEADER, rows),
            ),
        )


def check_names(skip: Sequence[str]) -> None:
    """Raises UserError for a name in `skip` that is no check."""
    known = [check.name for check in CHECKS]
    if unknown := [name for name in skip if name not in known]:
        raise UserError(f"--skip ({unknown[0]}) is no check; the checks are {', '.join(known)}")


def run_checks(target: str, subject: Subject, skip: Sequence[str] = ()) -> Audit:
    """Runs every check but those in `skip`."""
    num = len(subject.questions)
    asked = f"{num:,} {'question' if num == 1 else 'questions'} of {subject.questions.source}"
    return Audit(target, asked, {check.name: check.outcome(subject) for check in CHECKS if check.name not in skip})
