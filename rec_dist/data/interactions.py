"""Raw interactions in memory: what every reader returns and `prepare` consumes. Columns are numpy, names are decoded once.

Letters: R rows, U users, I items of the items table. Cost: 28 bytes a row, so 25 million rows take 0.7 GB.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rec_dist.runtime.errors import UserError
from rec_dist.stream.trunk import I64

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


@dataclass(frozen=True)
class Interactions:
    """All readable rows in file order.

    User (R,) indexes raw_users, item (R,) indexes items; timestamp counts the source's unit.
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


@dataclass
class BadRows:
    """Counts rows that cannot be read, by reason, and keeps the first of each kind to show."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, path: Path, lines: I64, text: str) -> None:
        """Counts the rows of `path` at `lines` (1-based, file order) under one reason; `text` is what the first of them holds."""
        if len(lines) == 0:
            return
        shown = text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "..."
        self.counts[reason] = self.counts.get(reason, 0) + len(lines)
        self.first.setdefault(reason, f"{path}:{int(lines[0])}: {reason} ({shown!r})")

    def describe(self) -> str:
        """One line: the first row of each kind, and how many there are of it."""
        return "; ".join(f"{self.first[reason]}, {count} of this kind" for reason, count in self.counts.items())

    def check(self, limit: int) -> None:
        """UserError when more than `limit` rows (data.max_bad_rows) could not be read."""
        total = sum(self.counts.values())
        if total > limit:
            raise UserError(
                f"data.max_bad_rows ({limit}) is exceeded: {total} rows cannot be read. {self.describe()}. "
                "Correct the files or raise data.max_bad_rows."
            )
