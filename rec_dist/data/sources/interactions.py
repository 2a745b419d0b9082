"""Raw interactions in memory, which every source returns and `prepare` takes. Columns are numpy arrays; names are decoded once.

Letters: R rows, U users, I items of the items table. Cost: 28 bytes per row, so 25 million rows take 0.7 GB.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I64

F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

_MAX_QUOTED = 60


@dataclass(frozen=True)
class ItemTable:
    """The catalogue as the source has it: four lists of length I. A year is None if the source has none."""

    raw: list[str]
    titles: list[str]
    years: list[int | None]
    categories: list[list[str]]

    def __len__(self) -> int:
        return len(self.raw)

    def take(self, index: I64) -> "ItemTable":
        """The items at `index`, in the order of `index`."""
        at = index.tolist()
        return ItemTable(
            [self.raw[i] for i in at],
            [self.titles[i] for i in at],
            [self.years[i] for i in at],
            [self.categories[i] for i in at],
        )


@dataclass(frozen=True)
class KnownItems:
    """What a reader needs of an items file: the names of its items (I,), and which of them have a title."""

    names: pa.Array
    titled: Bool


@dataclass(frozen=True)
class Interactions:
    """All readable rows in file order.

    user (R,): an index into raw_users, which are in the order of their first row. item (R,): an index into items.
    timestamp (R,): in the unit of the source, or a decimal fraction of it. An item without a title has an empty one; its rows
    cannot be used, and bad_rows counts them.
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


class UnusableRowError(Exception):
    """Says why a row cannot be used."""


@dataclass(frozen=True)
class Fault:
    """The first bad row of a kind: its file (the place among the files read, and the path), line (1-based) and text."""

    file: int
    path: Path
    line: int
    text: str


@dataclass
class BadRows:
    """Counts unreadable rows by reason, and keeps the first of each kind for messages. file: the place of the file being read."""

    file: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, Fault] = field(default_factory=dict)

    def add(self, reason: str, path: Path, lines: I64, text: str) -> None:
        """Counts the rows of `path` at `lines` (1-based, file order) under one reason. text: the text of the first of them."""
        if len(lines) == 0:
            return
        self.put(reason, len(lines), Fault(self.file, path, int(lines[0]), text))

    def merge(self, other: "BadRows", lines_before: int) -> None:
        """Adds the bad rows of a block that begins after `lines_before` lines of its file."""
        for reason, count in other.counts.items():
            fault = other.first[reason]
            self.put(reason, count, replace(fault, line=fault.line + lines_before))

    def put(self, reason: str, count: int, fault: Fault) -> None:
        """Counts rows under one reason. fault: the first of them."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        known = self.first.get(reason)
        if known is None or (fault.file, fault.line) < (known.file, known.line):
            self.first[reason] = fault

    def in_order(self) -> dict[str, int]:
        """The counts by reason, in the order of each kind's first row. They do not depend on how files were cut into blocks."""
        return {reason: self.counts[reason] for reason in sorted(self.counts, key=self._place)}

    def _place(self, reason: str) -> Any:
        fault = self.first[reason]
        return fault.file, fault.line, reason

    def describe(self) -> str:
        """One line with the first row of each kind and the number of rows of that kind."""
        shown = [
            f"{fault.path}:{fault.line}: {reason} ({_shortened(fault.text)!r}), {count} of this kind"
            for reason, count in self.in_order().items()
            for fault in [self.first[reason]]
        ]
        return "; ".join(shown)

    def notes(self) -> list[str]:
        """The note about bad rows for the manifest: one line, or nothing."""
        return [f"unreadable rows left out: {self.describe()}"] if self.counts else []

    def check(self, limit: int) -> None:
        """Raises UserError if more than `limit` rows (data.max_bad_rows) are unreadable."""
        total = sum(self.counts.values())
        if total > limit:
            raise UserError(
                f"data.max_bad_rows ({limit}) is exceeded: {total} rows cannot be read. {self.describe()}. "
                "Correct the files or raise data.max_bad_rows."
            )


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "..."
