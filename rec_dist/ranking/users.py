"""Whom to rank for, block by block: the users of a prepared data set, of a file, or of a list. Blocks bound the memory.

A file is read twice. The first pass checks every row before anything is computed, and counts the users; it keeps 8 bytes a user
to find ids that stand twice. The users of a data set take the index of its splits, 28 bytes a user, and 17 more.
"""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.dataset.schema import SPLITS
from rec_dist.data.sources.listings import as_names, as_text, place_of, read_listings
from rec_dist.errors import UserError
from rec_dist.ranking.catalogue import ItemNames
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.files import fingerprint, sha256


@dataclass(frozen=True)
class UserBlock:
    """Neighbouring users: their names in the source, and histories[b] (n_b,), the known items, oldest first.

    unknown: names in these histories that are no item.
    """

    users: list[str]
    histories: list[I32]
    unknown: int = 0


class Users(Protocol):
    """Users in a fixed order. total: how many. identity: tells other users, or another order, from these."""

    total: int
    identity: str

    def blocks(self, size: int, start: int = 0) -> Iterator[UserBlock]:
        """From user `start` on, `size` users at a time."""
        ...


class PreparedUsers:
    """The users of a data set in ascending order of their numbers.

    split None: each with all items, those of its test part included. Else the users of that split, each with what comes before
    its target in evaluation.
    """

    def __init__(self, data: PreparedData, split: str | None) -> None:
        self._splits = [data.split(name) for name in (SPLITS if split is None else (split,))]
        self._held_out = 0 if split is None else 1
        self._split, self._row = _longest_rows(self._splits)
        self.total = len(self._row)
        if not self.total:
            raise UserError(f"--split ({split}) of {data.location} has no user; choose the other split, or leave --split out")
        self.identity = split or "whole histories"

    def blocks(self, size: int, start: int = 0) -> Iterator[UserBlock]:
        """As Users.blocks."""
        for begin in range(start, self.total, size):
            yield self.block(slice(begin, begin + size))

    def block(self, chosen: slice) -> UserBlock:
        """The users `chosen`, by their places in the order."""
        which, rows = self._split[chosen], self._row[chosen]
        users, histories = [""] * len(rows), [np.empty(0, dtype=np.int32)] * len(rows)
        for number, split in enumerate(self._splits):
            here = np.flatnonzero(which == number)
            if len(here):
                _fill(split, rows[here], here.tolist(), self._held_out, users, histories)
        return UserBlock(users, histories)

    def names(self) -> Iterator[str]:
        """The names of all users in order, without reading their histories."""
        for which, row in zip(self._split.tolist(), self._row, strict=True):
            yield from self._splits[which].names_of(row[None])


class KnownUsers:
    """The users of a data set by name, each with the whole history. Cost: 16 bytes a user, and some 5 us to index one."""

    def __init__(self, data: PreparedData) -> None:
        self._users = PreparedUsers(data, None)
        hashes = np.fromiter((_hash(name) for name in self._users.names()), dtype=np.uint64, count=self._users.total)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def history(self, user: str) -> I32 | None:
        """The items of a user, oldest first; None for a name that is unknown."""
        place = int(np.searchsorted(self._hashes, np.uint64(_hash(user))))
        while place < len(self._hashes) and self._hashes[place] == _hash(user):
            number = int(self._order[place])
            block = self._users.block(slice(number, number + 1))
            if block.users[0] == user:
                return block.histories[0]
            place += 1
        return None


def _fill(split: SequenceSplit, rows: I64, places: list[int], held_out: int, users: list[str], histories: list[I32]) -> None:
    counts = split.offsets[rows + 1] - split.offsets[rows] - held_out
    flat, offsets = split.take(rows, counts), offsets_of(counts).tolist()
    for number, (place, name) in enumerate(zip(places, split.names_of(rows), strict=True)):
        users[place], histories[place] = name, flat[offsets[number] : offsets[number + 1]]


def _longest_rows(splits: Sequence[SequenceSplit]) -> tuple[I64, I64]:
    """(the split, the row in it) of every user's longest row, in ascending user order: (U,) each.

    A user's rows in several splits are prefixes of one sequence (data/dataset/schema.py), so the longest one is the sequence.
    """
    ids = np.concatenate([split.user_ids for split in splits])
    which = np.concatenate([np.full(len(split), number, dtype=np.int64) for number, split in enumerate(splits)])
    rows = np.concatenate([np.arange(len(split), dtype=np.int64) for split in splits])
    lengths = np.concatenate([np.diff(split.offsets) for split in splits])
    order = np.lexsort((which, lengths, ids))
    last = np.flatnonzero(np.append(ids[order][1:] != ids[order][:-1], True)) if len(ids) else np.empty(0, dtype=np.int64)
    chosen = order[last]
    return which[chosen], rows[chosen]


class FileUsers:
    """The users of a file, one a row (data/sources/listings.py). Raises UserError for any row that cannot be read."""

    def __init__(self, path: Path, names: ItemNames) -> None:
        self._path, self._names = path, names
        hashes = array("Q")
        for row in read_listings(path, "history", "--histories"):
            hashes.append(_hash(row.user))
        self.total = len(hashes)
        if not self.total:
            raise UserError(f"--histories ({path}) holds no user; give a row with user_id and history for each")
        ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64))
        self._refuse_twins(set(ordered[1:][ordered[1:] == ordered[:-1]].tolist()))
        self.identity = sha256(path)

    def _refuse_twins(self, repeated: set[int]) -> None:
        if not repeated:
            return
        seen: dict[str, int] = {}
        for row in read_listings(self._path, "history", "--histories"):
            if row.user in seen:
                raise UserError(
                    f"{place_of(self._path, row.row)}: user_id {row.user!r} stands in row {seen[row.user]} already; give each user "
                    "one row with the whole history"
                )
            if _hash(row.user) in repeated:
                seen[row.user] = row.row

    def blocks(self, size: int, start: int = 0) -> Iterator[UserBlock]:
        """As Users.blocks. Rows before `start` are read and dropped."""
        rows = islice(read_listings(self._path, "history", "--histories"), start, None)
        while some := list(islice(rows, size)):
            yield _found([row.user for row in some], [row.names for row in some], self._names)


class ListedUsers:
    """Users in memory: user -> history, or histories, whose users are then called 0, 1, 2 and so on."""

    def __init__(self, histories: Mapping[object, object] | Sequence[object], names: ItemNames) -> None:
        if isinstance(histories, str | bytes) or not isinstance(histories, Mapping | Sequence):
            raise UserError(
                f"histories is of type {type(histories).__name__}; give a path, a list of histories, or a mapping of users to them"
            )
        pairs = histories.items() if isinstance(histories, Mapping) else enumerate(histories)
        self._users = [as_text(user, f"histories: the user {user!r}") for user, _ in pairs]
        values = histories.values() if isinstance(histories, Mapping) else histories
        self._listed = [as_names(value, f"histories[{user}]") for user, value in zip(self._users, values, strict=True)]
        if len(set(self._users)) < len(self._users):
            raise UserError("histories: two users have the same name as text; give each user one history")
        self._names, self.total = names, len(self._users)
        self.identity = fingerprint([self._users, self._listed])

    def blocks(self, size: int, start: int = 0) -> Iterator[UserBlock]:
        """As Users.blocks."""
        for begin in range(start, self.total, size):
            yield _found(self._users[begin : begin + size], self._listed[begin : begin + size], self._names)


def _hash(user: str) -> int:
    return int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest(), "little")


def _found(users: list[str], listed: Sequence[list[str]], names: ItemNames) -> UserBlock:
    found = [names.find(history) for history in listed]
    return UserBlock(users, [items for items, _ in found], sum(unknown for _, unknown in found))
