"""checkpoint.remote: a copy of the run directory at another place, such as an object store, that outlives the machines of a run.

While a run trains, a thread of its driver copies what is new: a checkpoint at once, the rest every half minute. A checkpoint counts
there once its commit marker is there, which goes last. A run whose train.run_dir is not there, or is behind, begins with the copy.
Nothing is taken from either that the other may need: the copy loses old checkpoints alone, once newer ones are there. It belongs to
one run directory, since two would mix two runs: owner.json says to which, and the one that lost it stops. Workers know nothing of
this. Cost: reading and sending each checkpoint once, beside training.
"""

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rec_dist.checkpoint.files import COMMIT_NAME
from rec_dist.checkpoint.remote_fetch import KEY, fetch, read_object
from rec_dist.checkpoint.remote_files import FINISHED, OWNER, files_of, is_urgent, order_of, outdated
from rec_dist.errors import UnreachableError, UserError
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import fingerprint, is_remote, write_json
from rec_dist.storage.location import Location

logger = logging.getLogger(__name__)

_LOOK_SECONDS, _LATEST_SECONDS = 2.0, 30.0
_LAST_TRIES, _TRY_SECONDS = 3, 2.0
_INDEX = ".mirror.json"


class TakenOverError(UserError):
    """Another run directory writes to the copy now."""


class RemoteCopy:
    """The copy of `run` at `place`, a URI or an absolute folder. UserError: it cannot be opened, or one lies in the other."""

    def __init__(self, run: RunDirectory, place: str) -> None:
        if "\0" in place:
            raise UserError(f"{KEY} has a NUL character in it; give a folder or a URI, or leave it out")
        self._run, self._place = run, Location(place, key=KEY)
        here, there = run.path.resolve(), None if is_remote(place) else Path(place).resolve()
        if there is not None and (there.is_relative_to(here) or here.is_relative_to(there)):
            raise UserError(f"{KEY} ({place}) and train.run_dir ({run.path}) lie in each other; choose folders apart")
        self._about = {"place": fingerprint(place), "run_dir": str(run.path)}
        index = self._read_index()
        self._id: str = index.get("id") or uuid.uuid4().hex
        self._copied: dict[str, list[int]] = index.get("files", {})  # path -> [bytes, time of change in ns] as copied
        self._ended = threading.Event()
        self._fault: UserError | None = None

    def __str__(self) -> str:
        return str(self._place)

    def fetch(self, config: Mapping[str, Any]) -> None:
        """As mirror_fetch.fetch."""
        fetch(self._place, self._run, config)

    @contextmanager
    def kept_up(self) -> Iterator[None]:
        """Inside, the copy follows the run directory, which this process must hold; at the end it is the same.

        UserError: it cannot be written at all, or another run directory took it over meanwhile. UnreachableError: the run inside
        came to its end, and the copy could not be brought up to it.
        """
        self._take()
        thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except Exception:
            self._end(thread)
            if (reason := self._bring_up()) is not None:
                logger.warning(reason)
            raise
        self._end(thread)
        if (reason := self._bring_up()) is not None:
            raise UnreachableError(f"{reason}; the run itself is whole in {self._run.path}: run the same command again")

    def _take(self) -> None:
        """Makes the copy this run directory's. What is not there as the index says, by its size, is copied again."""
        owner = self._run.path / f".{OWNER}"
        write_json(owner, {"id": self._id, "host": socket.gethostname(), "run_dir": str(self._run.path)})
        self._place.write(owner, OWNER)
        owner.unlink()
        there = self._place.tree()
        known = {name: state for name, state in self._copied.items() if name in there and state[:1] == [there[name].bytes]}
        # Checkpoints that other attempts have left are known too, as of no size, so that they go when newer ones are there.
        self._copied = {**{name: [] for name in there if name.startswith("checkpoints/")}, **known}

    def _end(self, thread: threading.Thread) -> None:
        """TakenOverError: it was."""
        self._ended.set()
        thread.join()
        if isinstance(self._fault, TakenOverError):
            raise self._fault

    def _bring_up(self) -> str | None:
        """The last copy of this attempt; why it failed."""
        for left in reversed(range(_LAST_TRIES)):
            try:
                self.push()
            except UserError as fault:
                if isinstance(fault, TakenOverError):
                    raise
                if not left:
                    return str(fault)
                time.sleep(_TRY_SECONDS)
            else:
                return None
        return None

    def _follow(self) -> None:
        copied = time.monotonic()
        while not self._ended.wait(_LOOK_SECONDS):
            late = time.monotonic() - copied > _LATEST_SECONDS
            if not any(late or is_urgent(name) for name in self._changed()):
                continue
            copied = time.monotonic()
            try:
                self.push()
                if self._fault is not None:
                    self._run.log(f"{KEY}: {self} is up to date again")
                self._fault = None
            except TakenOverError as fault:
                self._fault = fault
                self._run.log(f"WARNING: {fault}")
                self._run.request_stop()
                return
            except UserError as fault:
                if self._fault is None:
                    self._run.log(f"WARNING: {fault}; trying again")
                self._fault = fault

    def _changed(self) -> dict[str, list[int]]:
        """What the copy lacks, or has otherwise; nothing before there is something to go on from."""
        here = files_of(self._run.path)
        if not any(Path(name).name == COMMIT_NAME or name == FINISHED for name in here):
            return {}
        return {name: state for name, state in here.items() if self._copied.get(name) != state}

    def push(self) -> None:
        """Copies what changed, then removes old checkpoints that went here. Nothing else is ever removed.

        UserError: it cannot be written. TakenOverError: it is another's now.
        """
        changed = self._changed()
        gone = outdated(self._copied, self._run.path)
        if not changed and not gone:
            return
        for name in sorted(changed, key=lambda name: (*order_of(name), changed[name][1])):
            with suppress(FileNotFoundError):  # an old checkpoint that went meanwhile
                self._check_owner()
                self._place.write(self._run.path / name, name)
                self._copied[name] = changed[name]
        for name in sorted(gone, key=order_of, reverse=True):
            self._check_owner()
            self._place.remove(name)
            del self._copied[name]
        write_json(self._run.path / _INDEX, {**self._about, "id": self._id, "files": self._copied})

    def _check_owner(self) -> None:
        """Before each file, for there is no lock. A copy that somebody removed is made anew by the next push."""
        owner = read_object(self._place, OWNER)
        if not owner:
            self._copied = {}
            self._take()
        elif owner.get("id") != self._id:
            raise TakenOverError(
                f"{KEY} ({self}) was taken over by the run in {owner.get('run_dir')} on {owner.get('host')}; let one of them run"
            )

    def _read_index(self) -> dict[str, Any]:
        """What this run directory knows of its copy: nothing where it is of another place, or was itself copied."""
        try:
            index = json.loads((self._run.path / _INDEX).read_text(encoding="utf-8"))
            same = {key: index[key] for key in self._about} == self._about and isinstance(index["files"], dict)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return dict(index) if same else {}
