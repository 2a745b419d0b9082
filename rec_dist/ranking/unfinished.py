"""The parts of a ranking beside its output, .NAME.parts: what a stopped or killed command leaves, and the same command continues.

key.json says what the parts belong to. A command that would compute anything else is rejected. At the end the parts are joined,
the output gets its name, and the folder goes away.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec_dist.data.artifacts.recommendations import Part, RecordBatch, counts_of, join_parts, parts_in, write_part
from rec_dist.errors import UserError
from rec_dist.ranking.rank import Counts
from rec_dist.storage.files import json_text, lock, make_folder, read_object, sha256, write_json
from rec_dist.storage.outputs import check_output

_KEY_NAME, _JOINED_NAME = "key.json", "joined.json"  # joined.json: size and hash of the output, before it gets its name
_ROWS, _SECONDS = 1 << 18, 20.0  # a part is written after so many rows or seconds: 20 s are lost at most, and a file takes 20 ms


def parts_folder(output: Path) -> Path:
    """The folder of the parts of `output`."""
    return output.with_name(f".{output.name}.parts")


class Unfinished:
    """The parts so far. folder: where they lie. start: the first user that is in none of them."""

    def __init__(self, output: Path) -> None:
        self.folder, self._output = parts_folder(output), output
        self.start, self.counts = 0, Counts()
        damaged = False
        for part in parts_in(self.folder):
            counts = None if damaged else counts_of(part)
            damaged = counts is None  # from the first damaged part on, users are ranked again
            if counts is None:
                part.path.unlink()
            else:
                self.start, self.counts = part.stop, self.counts.plus(Counts(**counts))
        self._waiting: list[RecordBatch] = []
        self._of_waiting, self._since = Counts(), time.monotonic()

    def add(self, batch: RecordBatch, counts: Counts) -> None:
        """Takes the next block of users."""
        self._waiting.append(batch)
        self._of_waiting = self._of_waiting.plus(counts)
        if sum(len(one) for one in self._waiting) >= _ROWS or time.monotonic() - self._since >= _SECONDS:
            self._write()

    def finish(self, then: Callable[[], None] | None = None) -> None:
        """Joins the parts to the output, calls `then`, and removes the folder: a kill before that loses no work."""
        self._write()
        join_parts(self._parts(), self._output, joined=lambda path: write_json(self.folder / _JOINED_NAME, _described(path)))
        if then is not None:
            then()
        shutil.rmtree(self.folder, ignore_errors=True)  # another process may have seen the output, and begun to

    def _parts(self) -> list[Part]:
        return parts_in(self.folder)

    def _write(self) -> None:
        counts = self._of_waiting
        if counts.users:
            write_part(self.folder, self.start, self.start + counts.users, self._waiting, vars(counts))
            self.start += counts.users
            self.counts = self.counts.plus(counts)
        self._waiting, self._of_waiting, self._since = [], Counts(), time.monotonic()


@contextmanager
def unfinished(output: Path, key: Mapping[str, Any], option: str = "--out") -> Iterator[Unfinished]:
    """Holds the parts of `output` for this process. A UserError before the first part leaves nothing behind.

    option: what names the output, for messages. Raises UserError for parts of another key, and if another process holds them.
    """
    folder = parts_folder(output)
    new = not folder.exists()
    if not new and not folder.is_dir():
        raise UserError(f"{folder} is no folder, and the parts of {option} would lie there; remove it, or choose another")
    _check(folder, key, option)
    make_folder(folder, "owner")  # the parts hold the source's names of users
    try:
        held = lock(folder / ".lock")
    except BlockingIOError as fault:
        raise UserError(f"{option} ({output}) is being written by another process; wait for it or choose another") from fault
    try:
        _check(folder, key, option)  # again: another process may have left its parts since
        if not (folder / _KEY_NAME).is_file():
            write_json(folder / _KEY_NAME, key)
        yield Unfinished(output)
    except UserError:
        if new and not parts_in(folder):
            shutil.rmtree(folder)
        raise
    finally:
        os.close(held)


def is_done(output: Path, key: Mapping[str, Any], option: str = "--out", *, then: Callable[[], None] | None = None) -> bool:
    """Whether `output` is there and was killed before it could remove its parts, which this does, after `then` of Unfinished.finish.

    Raises UserError for any other file at `output`, and for one that cannot be written.
    """
    folder = parts_folder(output)
    if not (output.is_file() and (folder / _JOINED_NAME).is_file() and not _different(folder, key)) or (
        read_object(folder / _JOINED_NAME, "remove that folder") != _described(output)
    ):
        check_output(output, option)
        return False
    if then is not None:
        then()
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _described(output: Path) -> dict[str, Any]:
    return {"bytes": output.stat().st_size, "sha256": sha256(output)}


def _check(folder: Path, key: Mapping[str, Any], option: str) -> None:
    if not folder.exists() or (not (folder / _KEY_NAME).exists() and not parts_in(folder)):
        return
    if changed := _different(folder, key):
        raise UserError(
            f"{folder} holds parts of another ranking (different: {', '.join(changed)}); remove that folder, or choose another "
            f"{option}"
        )


def _different(folder: Path, key: Mapping[str, Any]) -> list[str]:
    old = read_object(folder / _KEY_NAME, "remove that folder")
    new = {name: json_text(value) for name, value in key.items()}
    return sorted(name for name in old.keys() | new.keys() if name not in old or json_text(old[name]) != new.get(name))
