"""Files of a prepared data set as they lie on this node, each checked against its SHA-256 once a node and not once a process.

A remote file is fetched whole when it is first needed. It lies in the cache under its own hash, so that its being there is the mark
that it was checked; a data set that changed at its place never meets old files, and two places of one data set share them. A file
that lies on this machine is read where it is; that it was checked is remembered by its path, size, inode and times. The cache holds
at most so many bytes: what was used longest ago goes first, and what is being fetched counts. A file that goes while a process has
it mapped stays readable there, and its room is free when that process lets it go.

    shards/HASH.arrow  checked      shards/HASH.tmp  on its way      shards/HASH.lock, checked/MARK  of 0 to 2 bytes

Any number of processes share it: a lock a file, so that one fetches and the others wait. Cost: fetching, and hashing at 1 GB/s.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from rec_dist.data.dataset.manifest import FileEntry
from rec_dist.errors import UserError
from rec_dist.storage.files import fingerprint, sha256
from rec_dist.storage.location import REMEDY, Location, reason

_SETTLED_SECONDS = 2.0  # a file changed later than this ago may change again within the tick of its time stamp
_WAIT_SECONDS = 0.05  # between looks for room that other processes' downloads hold
_CHECKED = b"ok"


class NodeCache:
    """The cache in `folder`, at most max_bytes of fetched files."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._shards, self._marks = folder / "shards", folder / "checked"

    @contextmanager
    def opened(self, location: Location, entry: FileEntry) -> Iterator[Path]:
        """A path to read the file `entry` of `location` at: it has the bytes that the manifest says, and stays while inside.

        UserError: it is missing, of other bytes, larger than the cache, or the cache cannot be written. UnreachableError: the store
        broke off.
        """
        if location.is_remote:
            with self._fetched(location, entry) as path:
                yield path
        else:
            self._check(location.folder / entry.name, entry)
            yield location.folder / entry.name

    @contextmanager
    def _fetched(self, location: Location, entry: FileEntry) -> Iterator[Path]:
        path = self._shards / f"{entry.sha256}.arrow"
        with ExitStack() as held:
            with self._guarded():
                held.enter_context(self._lock(path.with_suffix(".lock")))
                if not path.is_file() or path.stat().st_size != entry.bytes:
                    self._fetch(location, entry, path)
                self.touch(path)
            yield path

    def _fetch(self, location: Location, entry: FileEntry, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        with self._room():
            for left in (path, temporary):  # by a process that was killed, or a disk
                left.unlink(missing_ok=True)
        self._reserve(temporary, location.name(entry.name), entry.bytes)
        try:
            found = location.copy(entry.name, temporary)
            _compare(location.name(entry.name), entry, temporary.stat().st_size, found)
            with self._room():
                temporary.replace(path)
        finally:
            with self._room():
                temporary.unlink(missing_ok=True)

    def _room(self) -> AbstractContextManager[bool]:
        """Held where files come, go or are counted, so that none is missed on its way from one name to another."""
        return self._lock(self.folder / "room.lock")

    @staticmethod
    def touch(path: Path) -> None:
        """Marks a fetched file as used now; nothing where it has gone."""
        with suppress(FileNotFoundError):
            os.utime(path)

    def _reserve(self, temporary: Path, name: str, needed: int) -> None:
        """Makes `temporary` of `needed` bytes (a hole), after as many others have gone as that takes."""
        if needed > self.max_bytes:
            raise UserError(f"data.cache_bytes ({self.max_bytes}) is smaller than {name} ({needed} bytes); raise it")
        while True:
            with self._room():
                if self._make_room(needed):
                    with temporary.open("wb") as handle:
                        handle.truncate(needed)
                    return
            time.sleep(_WAIT_SECONDS)

    def _make_room(self, needed: int) -> bool:
        """Removes files, oldest use first, until `needed` bytes fit. False: the rest is in other hands just now."""
        files = [(path, path.stat()) for path in self._shards.iterdir() if path.suffix != ".lock"]
        total = sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda item: item[1].st_mtime_ns):
            if total + needed <= self.max_bytes:
                break
            with self._lock(path.with_suffix(".lock"), wait=False) as free:  # one that is being fetched or opened is left
                if free:
                    path.unlink(missing_ok=True)
                    total -= stat.st_size
        return total + needed <= self.max_bytes

    def _check(self, path: Path, entry: FileEntry) -> None:
        """Hashes a file of this machine unless this node did since it last changed."""
        try:
            stat = path.stat()
        except OSError:
            raise UserError(f"{path}: the file is missing; {REMEDY}") from None
        seen = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, entry.sha256]
        mark = self._marks / fingerprint(seen)
        with self._guarded(), self._lock(mark):
            if mark.read_bytes() == _CHECKED:
                return
            _compare(str(path), entry, stat.st_size, sha256(path))
            if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS:
                mark.write_bytes(_CHECKED)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            for folder in (self._shards, self._marks):
                folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as fault:
            raise UserError(
                f"data.cache_dir ({self.folder}) cannot be used ({reason(fault)}); name a folder with room on this node"
            ) from fault

    @contextmanager
    def _lock(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """Holds the lock of a file; False where wait is false and another holds it."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(handle)


def _compare(name: str, entry: FileEntry, size: int, found: str) -> None:
    if size != entry.bytes:
        raise UserError(f"{name}: {size} bytes instead of {entry.bytes}; {REMEDY}")
    if found != entry.sha256:
        raise UserError(f"{name}: SHA-256 is {found} instead of {entry.sha256}; {REMEDY}")
