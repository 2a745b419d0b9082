"""checkpoint.remote: a copy of the run directory in another place, such as an object store, that outlives the machines of a run.

While a run trains, a thread of its driver copies new files: a checkpoint at once, everything else every half minute. The commit
marker of a checkpoint is copied last, and the checkpoint counts only from then on. A run whose train.run_dir is missing or
behind starts from the copy. Neither side deletes a file that the other may still need: the copy drops only old checkpoints,
once it has newer ones. A copy belongs to one run directory, since two would mix two runs. owner.json names it, and a run that
has lost its copy stops. Workers know nothing of this. Cost: each checkpoint is read and sent once, beside training.
"""

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rec_dist.checkpoint.files import is_marker
from rec_dist.checkpoint.remote_fetch import KEY, fetch, read_object
from rec_dist.checkpoint.remote_files import CONFIG, FINISHED, OWNER, files_of, is_urgent, order_of, outdated
from rec_dist.errors import UnreachableError, UserError
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import fingerprint, write_json
from rec_dist.storage.location import Location

logger = logging.getLogger(__name__)

_LOOK_SECONDS, _LATEST_SECONDS = 2.0, 30.0
_LAST_TRIES, _TRY_SECONDS = 3, 2.0
_INDEX = ".remote.json"


class TakenOverError(UserError):
    """Another run directory has taken over the copy."""


class RemoteCopy:
    """The copy of `run` at `place`, a URI or an absolute folder.

    Raises UserError if the place cannot be opened, or if one folder is inside the other.
    """

    def __init__(self, run: RunDirectory, place: str) -> None:
        if "\0" in place:
            raise UserError(f"{KEY} has a NUL character in it; give a folder or a URI, or leave it out")
        self._run, self._place = run, Location(place, key=KEY)
        if not self._place.is_remote:
            here, there = run.path.resolve(), self._place.folder.resolve()
            if there.is_relative_to(here) or here.is_relative_to(there):
                raise UserError(
                    f"{KEY} ({place}) and train.run_dir ({run.path}) are one inside the other; choose separate folders"
                )
        self._about = {"place": fingerprint(place), "run_dir": str(run.path)}
        index = self._read_index()
        self._id: str = index.get("id") or uuid.uuid4().hex
        self._copied: dict[str, list[int]] = index.get("files", {})  # path -> [bytes, time of change in ns] as copied
        self._ended = threading.Event()
        self._fault: UserError | None = None

    def __str__(self) -> str:
        return str(self._place)

    def config(self) -> dict[str, Any]:
        """The configuration of the run in the copy; empty without one. Raises UserError if it is damaged."""
        return read_object(self._place, CONFIG)

    def fetch(self, config: Mapping[str, Any]) -> None:
        """As remote_fetch.fetch."""
        fetch(self._place, self._run, config)

    @contextmanager
    def kept_up(self) -> Iterator[None]:
        """Inside, keeps the copy up to date with the run directory, which this process must hold. On exit, both are the same.

        Raises UserError if the copy cannot be written at all, or if another run directory took it over. Raises UnreachableError
        if the run inside has ended but the copy could not be updated to its end.
        """
        self._take()
        thread = threading.Thread(target=self._follow, name="remote-copy", daemon=True)
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
        """Claims the copy for this run directory. Files whose size in the copy differs from the index will be copied again."""
        owner = self._run.path / f".{OWNER}"
        write_json(owner, {"id": self._id, "host": socket.gethostname(), "run_dir": str(self._run.path)})
        self._place.write(owner, OWNER)
        owner.unlink()
        there = self._place.tree()
        known = {name: state for name, state in self._copied.items() if name in there and state[:1] == [there[name].bytes]}
        # Checkpoints that other attempts left are listed too, without a size, so that they are removed once there are newer ones.
        self._copied = {**{name: [] for name in there if name.startswith("checkpoints/")}, **known}

    def _end(self, thread: threading.Thread) -> None:
        """Stops the thread. Raises TakenOverError if the copy was taken over."""
        self._ended.set()
        thread.join()
        if isinstance(self._fault, TakenOverError):
            raise self._fault

    def _bring_up(self) -> str | None:
        """Copies the last changes of this attempt. Returns the reason if that fails."""
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
        """The files that the copy lacks or has in another version; none until the run has a checkpoint or is finished."""
        here = files_of(self._run.path)
        if not any(is_marker(name) or name == FINISHED for name in here):
            return {}
        return {name: state for name, state in here.items() if self._copied.get(name) != state}

    def push(self) -> None:
        """Copies changed files, then removes old checkpoints that the run directory has dropped. Never removes anything else.

        Raises UserError if the copy cannot be written, and TakenOverError if it belongs to another run directory now.
        """
        changed = self._changed()
        gone = outdated(self._copied, self._run.path)
        if not changed and not gone:
            return
        for name in sorted(changed, key=lambda name: (*order_of(name), changed[name][1])):
            with suppress(FileNotFoundError):  # an old checkpoint may be removed meanwhile
                self._check_owner()
                self._place.write(self._run.path / name, name)
                self._copied[name] = changed[name]
        for name in sorted(gone, key=order_of, reverse=True):
            self._check_owner()
            self._place.remove(name)
            del self._copied[name]
        write_json(self._run.path / _INDEX, {**self._about, "id": self._id, "files": self._copied})

    def _check_owner(self) -> None:
        """Runs before each file, because there is no lock. If somebody removed the copy, the next push makes it again."""
        owner = read_object(self._place, OWNER)
        if not owner:
            self._copied = {}
            self._take()
        elif owner.get("id") != self._id:
            raise TakenOverError(
                f"{KEY} ({self}) was taken over by the run in {owner.get('run_dir')} on {owner.get('host')}; let one of them run"
            )

    def _read_index(self) -> dict[str, Any]:
        """What this run directory knows about its copy; empty if the index belongs to another place or run directory."""
        try:
            index = json.loads((self._run.path / _INDEX).read_text(encoding="utf-8"))
            same = {key: index[key] for key in self._about} == self._about and isinstance(index["files"], dict)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return dict(index) if same else {}
