"""Raw interactions in memory: what every reader returns and `prepare` consumes. Columns are numpy, names are decoded once.

Letters: R rows, U users, I items of the items table. Cost: 28 bytes a row, so 25 million rows take 0.7 GB.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I64

F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

_MAX_QUOTED = 60


@dataclass(frozen=True)
class ItemTable:
    """The catalogue as the source writes it; four lists of length I. Years are None where the source has none."""

    raw: list[str]
    titles: list[str]
    years: list[int | None]
    categories: list[list[str]]

    def __len__(self) -> int:
        return len(self.raw)

    def take(self, index: I64) -> "ItemTable":
        """The items at `index`, in its order."""
        at = index.tolist()
        return ItemTable(
            [self.raw[i] for i in at],
            [self.titles[i] for i in at],
            [self.years[i] for i in at],
            [self.categories[i] for i in at],
        )


@dataclass(frozen=True)
class Interactions:
    """All readable rows in file order.

    User (R,) indexes raw_users, which stand in the order of their first row; item (R,) indexes items; timestamp counts the
    source's example.
    """

    user: I64
    item: I64
    rating: F32 | None
    timestamp: I64 | None
    raw_users: list[str]
    items: ItemTable
    bad_rows: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class Fault:
    """The first bad row of a kind: file (its place among the files read, and its path), line (1-based), what it holds."""

    file: int
    path: Path
    line: int
    text: str


@dataclass
class BadRows:
    """Counts rows that cannot be read, by reason, and keeps the first of each kind to show. file: which file is being read."""

    file: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, Fault] = field(default_factory=dict)

    def add(self, reason: str, path: Path, lines: I64, text: str) -> None:
        """Counts the rows of `path` at `lines` (1-based, file order) under one reason; `text` is what the first of them holds."""
        if len(lines) == 0:
            return
        shown = text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "..."
        self._add(reason, len(lines), Fault(self.file, path, int(lines[0]), shown))

    def merge(self, other: "BadRows", lines_before: int) -> None:
        """Takes in what was found in a block that begins after `lines_before` lines of its file."""
        for reason, count in other.counts.items():
            fault = other.first[reason]
            self._add(reason, count, replace(fault, line=fault.line + lines_before))

    def _add(self, reason: str, count: int, fault: Fault) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        known = self.first.get(reason)
        if known is None or (fault.file, fault.line) < (known.file, known.line):
            self.first[reason] = fault

    def in_order(self) -> dict[str, int]:
        """The counts by reason, in the order of each kind's first row: the same however the files were cut into blocks."""
        return {reason: self.counts[reason] for reason in sorted(self.counts, key=self._place)}

    def _place(self, reason: str) -> Any:
        fault = self.first[reason]
        return fault.file, fault.line, reason

    def describe(self) -> str:
        """One line: the first row of each kind, and how many there are of it."""
        shown = [
            f"{fault.path}:{fault.line}: {reason} ({fault.text!r}), {count} of this kind"
            for reason, count in self.in_order().items()
            for fault in [self.first[reason]]
        ]
        return "; ".join(shown)

    def notes(self) -> list[str]:
        """What the manifest says of them: one line, or nothing."""
        return [f"unreadable rows left out: {self.describe()}"] if self.counts else []

    def check(self, limit: int) -> None:
        """UserError when more than `limit` rows (data.max_bad_rows) could not be read."""
        total = sum(self.counts.values())
        if total > limit:
            raise UserError(
                f"data.max_bad_rows ({limit}) is exceeded: {total} rows cannot be read. {self.describe()}. "
                "Correct the files or raise data.max_bad_rows."
            )
