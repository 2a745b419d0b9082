"""checkpoint.mirror: a copy of the run directory at another place, such as an object store, that outlives the machines of a run.

While a run trains, a thread of its driver copies what is new: a checkpoint at once, the rest every half minute. A checkpoint counts
there once its commit marker is there, which goes last. A run whose train.run_dir is not there, or is behind, begins with the copy. Two
run directories that write to one copy would mix two runs, so it belongs to one: owner.json says to which, and the one that lost it
stops. Workers know nothing of this. Cost: reading and sending each checkpoint once, beside training.
"""

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rec_dist.data.prepared.location import Location, Stored
from rec_dist.engine.checkpoint import COMMIT_NAME, committed
from rec_dist.pipeline.mirrored_files import (
    CONFIG,
    FINISHED,
    OWNER,
    files_of,
    is_urgent,
    newest_step,
    order_of,
    parts_of,
    state_of,
    wanted,
)
from rec_dist.runtime.disk import writing
from rec_dist.runtime.errors import UnreachableError, UserError
from rec_dist.runtime.files import is_remote, write_json
from rec_dist.runtime.identity import differences
from rec_dist.runtime.run_directory import RunDirectory

_LOOK_SECONDS, _LATEST_SECONDS = 2.0, 30.0
_LAST_TRIES, _TRY_SECONDS = 3, 2.0
_INDEX, _FETCHED = ".mirror.json", ".fetched"
KEY = "checkpoint.mirror"


class TakenOverError(UserError):
    """Another run directory writes to the copy now."""


class Mirror:
    """The copy of `run` at `place`, a URI or an absolute folder. UserError: it cannot be opened, or lies in the run directory."""

    def __init__(self, run: RunDirectory, place: str) -> None:
        self._run, self._place = run, Location(place, key=KEY)
        if not is_remote(place) and Path(place).resolve().is_relative_to(run.path.resolve()):
            raise UserError(f"{KEY} ({place}) lies in train.run_dir ({run.path}); choose a folder or URI apart from it")
        index = self._read_index()
        self._id: str = index.get("id") or uuid.uuid4().hex
        self._copied: dict[str, list[int]] = index.get("files", {})  # path -> [bytes, time of change in ns] as copied
        self._ended = threading.Event()
        self._fault: UserError | None = None

    def __str__(self) -> str:
        return str(self._place)

    def fetch(self, config: Mapping[str, Any], *, log: Callable[[str], None]) -> None:
        """Fills the run directory from the copy where that is further. Call before the run directory is claimed.

        UserError: the copy is of another configuration or holds other files, or cannot be read.
        """
        files = self._place.tree()
        if CONFIG not in files:
            if others := sorted(set(files) - {OWNER}):
                raise UserError(f"{KEY} ({self}) holds no run and is not empty ({others[0]}); choose another")
            self._copied = {}
            return
        if changed := differences(self._object(CONFIG), json.loads(json.dumps(config))):
            raise UserError(
                f"{KEY} ({self}) holds a run of another configuration (different: {', '.join(changed[:6])}); choose another, or "
                "remove what is there"
            )
        if self._object(OWNER).get("id") == self._id:
            return
        self._copied = {}
        if not self._is_ahead(files):
            return
        with self._run.locked():
            log(f"{KEY}: fetching the run from {self}")
            began = time.perf_counter()
            self._fetch(wanted(files))
        size = sum(files[name].bytes for name in self._copied)
        log(f"{KEY}: {len(self._copied)} files, {size / 1e6:.1f} MB in {time.perf_counter() - began:.1f} s")

    def _is_ahead(self, files: Mapping[str, Stored]) -> bool:
        here = self._run
        if not here.config_path.is_file():
            return True
        if here.finished() is not None:
            return False
        return FINISHED in files or newest_step(files) > max(committed(here.checkpoints), default=-1)

    def _fetch(self, files: Mapping[str, Stored]) -> None:
        """All to a folder beside, then into place: what says that a run is there first, what says how far it is last."""
        beside, copied = self._run.path / _FETCHED, dict[str, list[int]]()
        with writing(self._run.path):
            shutil.rmtree(beside, ignore_errors=True)
            for name, stored in files.items():
                target = beside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._place.copy(name, target)
                os.utime(target, (stored.written, stored.written))
                copied[name] = state_of(target)
            for step in parts_of(beside):
                target = self._run.path / step.relative_to(beside)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                step.replace(target)
            shutil.rmtree(beside)
        self._copied = copied

    @contextmanager
    def kept_up(self, log: Callable[[str], None]) -> Iterator[None]:
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
                log(f"WARNING: {reason}")
            raise
        self._end(thread)
        if (reason := self._bring_up()) is not None:
            raise UnreachableError(f"{reason}; the run itself is whole in {self._run.path}: run the same command again")

    def _take(self) -> None:
        """Makes the copy this run directory's. What lies there and is not known to be as here is written anew, or removed."""
        owner = self._run.path / f".{OWNER}"
        write_json(owner, {"id": self._id, "host": socket.gethostname(), "run_dir": str(self._run.path)})
        self._place.write(owner, OWNER)
        owner.unlink()
        for name in wanted(self._place.tree(), torn=True):
            self._copied.setdefault(name, [])

    def _end(self, thread: threading.Thread) -> None:
        """TakenOverError: it was."""
        self._ended.set()
        thread.join()
        if isinstance(self._fault, TakenOverError):
            raise self._fault

    def _bring_up(self) -> str | None:
        """The last copy of this attempt; why it failed."""
        fault: UserError | None = None
        for _ in range(_LAST_TRIES):
            try:
                self.push()
                return None
            except TakenOverError:
                raise
            except UserError as error:
                fault = error
                time.sleep(_TRY_SECONDS)
        return str(fault)

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
        """Copies what changed and removes what went. UserError: it cannot be written. TakenOverError: it is another's now."""
        changed = self._changed()
        gone = self._copied.keys() - files_of(self._run.path).keys() if self._copied else set()
        if not changed and not gone:
            return
        owner = self._object(OWNER)
        if owner.get("id") != self._id:
            raise TakenOverError(
                f"{KEY} ({self}) was taken over by the run in {owner.get('run_dir')} on {owner.get('host')}; let one of them run"
            )
        for name in sorted(changed, key=lambda name: (*order_of(name), changed[name][1])):
            with suppress(FileNotFoundError):  # an old checkpoint that went meanwhile
                self._place.write(self._run.path / name, name)
                self._copied[name] = changed[name]
        for name in sorted(gone, key=order_of, reverse=True):
            self._place.remove(name)
            del self._copied[name]
        index = {"place": str(self), "run_dir": str(self._run.path), "id": self._id, "files": self._copied}
        write_json(self._run.path / _INDEX, index)

    def _object(self, name: str) -> dict[str, Any]:
        """A JSON object of the copy, empty where there is none. UserError: it is damaged, or cannot be read."""
        text = self._place.read(name)
        try:
            return {} if text is None else dict(json.loads(text))
        except (ValueError, TypeError):
            raise UserError(f"{KEY}: {self._place.name(name)} is damaged; choose another, or remove what is there") from None

    def _read_index(self) -> dict[str, Any]:
        """What this run directory knows of its copy: nothing where it is of another place, or was itself copied."""
        try:
            index = json.loads((self._run.path / _INDEX).read_text(encoding="utf-8"))
            same = (index["place"], index["run_dir"]) == (str(self), str(self._run.path))
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return dict(index) if same else {}
