"""The candidates of each user, looked up by name in a temporary SQLite file: memory does not grow with the number of users.

Cost: 4 bytes a candidate on disk, about 10 us a user to store and 5 us to look up.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np

from rec_dist.data.sources.listings import Listing, place_of
from rec_dist.errors import UserError
from rec_dist.ranking.catalogue import ItemNames
from rec_dist.runtime.arrays import I32

_LOOKED_UP = 500  # names in one query; SQLite takes at least 999 variables


class Lists(Protocol):
    """Lists of candidates by the names of users."""

    def of(self, users: Sequence[str]) -> list[I32 | None]:
        """The candidates of each user, None for one without a list."""
        ...


class GivenLists:
    """Implements Lists for users whose candidates have been looked up."""

    def __init__(self, users: Sequence[str], candidates: Sequence[I32 | None]) -> None:
        self._lists = dict(zip(users, candidates, strict=True))

    def of(self, users: Sequence[str]) -> list[I32 | None]:
        """As Lists.of."""
        return [self._lists[user] for user in users]


class CandidateLists:
    """Implements Lists. users: how many have candidates. shortest, longest: of their lists.

    unknown: names that are no item, left out.
    """

    def __init__(self, path: Path, rows: Iterable[Listing], names: ItemNames, source: Path | None) -> None:
        """Stores the lists in the new file `path`. source: the file that rows came from, for messages.

        Raises UserError for a user who stands twice, and if no list has an item.
        """
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=OFF")
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.execute("CREATE TABLE lists (user TEXT PRIMARY KEY, items BLOB) WITHOUT ROWID")
        self.users = self.unknown = self.longest = 0
        self.shortest = 1 << 62
        self._database.execute("BEGIN")
        for row in rows:
            items, unknown = names.find(row.names)
            items = items[np.sort(np.unique(items, return_index=True)[1])]  # once each, in their order
            self.unknown += unknown
            self.shortest, self.longest = min(self.shortest, len(items)), max(self.longest, len(items))
            try:
                self._database.execute("INSERT INTO lists VALUES (?, ?)", (row.user, items.tobytes()))
            except sqlite3.IntegrityError:
                place = f"{place_of(source, row.row)}: " if source is not None else "candidates: "
                raise UserError(f"{place}user_id {row.user!r} stands twice; give each user one list of candidates") from None
            self.users += 1
        self._database.execute("COMMIT")
        if not self.longest:
            place = f"--candidates ({source})" if source is not None else "candidates"
            raise UserError(f"{place} names no item of the catalogue for any user; give ids or titles of the data set")

    def of(self, users: Sequence[str]) -> list[I32 | None]:
        """As Lists.of."""
        found: dict[str, bytes] = {}
        for begin in range(0, len(users), _LOOKED_UP):
            some = users[begin : begin + _LOOKED_UP]
            marks = ",".join("?" * len(some))
            with closing(self._database.execute(f"SELECT user, items FROM lists WHERE user IN ({marks})", some)) as rows:
                found.update(rows)
        return [np.frombuffer(found[user], dtype=np.int32) if user in found else None for user in users]

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()
