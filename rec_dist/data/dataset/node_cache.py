"""The node's cache of data set files. Each file is checked against its SHA-256 once per node, not once per process.

A remote file is fetched whole when it is first needed. The cache names it by its hash, so a file in the cache is a checked
file. A data set that changes in its place never meets old files, and two copies of one data set share theirs. A file on this
machine is read where it is; the cache remembers by path, size, inode and times that it was checked. The cache holds at most
max_bytes, downloads included, and evicts the least recently used file first. An evicted file that a process has mapped stays
readable there, and its disk space is freed when that process unmaps it.

    shards/HASH.arrow  checked      shards/HASH.tmp  being fetched      shards/HASH.lock, checked/MARK  0 to 2 bytes

Any number of processes can share the cache: a lock per file lets one fetch it while the others wait. Cost: the download, and
hashing at 1 GB/s.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from rec_dist.data.dataset.schema import PREPARE_AGAIN
from rec_dist.errors import UserError
from rec_dist.storage.checksums import FileEntry
from rec_dist.storage.files import fingerprint, make_folder, put_in_place, sha256
from rec_dist.storage.location import Location, NoSuchFileError, reason

_SETTLED_SECONDS = 2.0  # a file that changed more recently could change again with the same time stamp
_WAIT_SECONDS = 0.05  # pause before looking again for room that downloads of other processes hold
_CHECKED = b"ok"
_OWN = re.compile(r"[0-9a-f]{64}\.(arrow|tmp)")  # what this cache may remove; data.cache_dir may name a folder with other files


class NodeCache:
    """The cache in `folder`, with at most max_bytes of fetched files."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._shards, self._marks = folder / "shards", folder / "checked"

    @contextmanager
    def opened(self, location: Location, entry: FileEntry) -> Iterator[Path]:
        """Yields a path to the file `entry` of `location`, with exactly the bytes that the manifest says. Inside, the file stays.

        Raises UserError if the file is missing, damaged or larger than the cache, or if the cache cannot be written. Raises
        UnreachableError if the store stops answering.
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
            for left in (path, temporary):  # left by a killed process or a faulty disk
                left.unlink(missing_ok=True)
        self._reserve(temporary, location.name(entry.name), entry.bytes)
        try:
            try:
                found = location.copy(entry.name, temporary)
            except NoSuchFileError as fault:
                raise UserError(f"{fault}; {PREPARE_AGAIN}") from None
            _compare(location.name(entry.name), entry, temporary.stat().st_size, found)
            with self._room():
                put_in_place(temporary, path)  # a power cut must not leave a file of the right size under the name of its hash
        finally:
            with self._room():
                temporary.unlink(missing_ok=True)

    def _room(self) -> AbstractContextManager[bool]:
        """The lock for adding, removing and counting files, so that no file is missed while it is renamed."""
        return self._lock(self.folder / "room.lock")

    @staticmethod
    def touch(path: Path) -> None:
        """Marks a fetched file as used now, if it still exists."""
        with suppress(FileNotFoundError):
            os.utime(path)

    def _reserve(self, temporary: Path, name: str, needed: int) -> None:
        """Evicts files until `needed` bytes fit, then reserves them by a sparse file `temporary`."""
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
        """Removes files, least recently used first, until `needed` bytes fit. Returns False if the others are in use now."""
        files = [(path, path.stat()) for path in self._shards.iterdir() if _OWN.fullmatch(path.name)]
        total = sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda item: item[1].st_mtime_ns):
            if total + needed <= self.max_bytes:
                break
            with self._lock(path.with_suffix(".lock"), wait=False) as free:  # skip a file that is being fetched or opened
                if free:
                    path.unlink(missing_ok=True)
                    total -= stat.st_size
        return total + needed <= self.max_bytes

    def _check(self, path: Path, entry: FileEntry) -> None:
        """Hashes a file on this machine, unless this node has done so since the file last changed."""
        try:
            stat = path.stat()
        except OSError:
            raise UserError(f"{path} is missing; {PREPARE_AGAIN}") from None
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
            make_folder(self.folder, "owner")
            for folder in (self._shards, self._marks):
                make_folder(folder)
            yield
        except OSError as fault:
            raise UserError(
                f"data.cache_dir ({self.folder}) cannot be used ({reason(fault)}); name a folder with room on this node"
            ) from fault

    @contextmanager
    def _lock(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """Holds the lock of a file. Yields False if `wait` is false and another process holds it."""
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
    if damage := entry.damage(size, found):
        raise UserError(f"{name} {damage}; {PREPARE_AGAIN}")
