"""The node's cache of data set files. Each file is checked against its SHA-256 once per node and boot, not once per process.

A remote file is fetched whole when it is first needed. The cache names it by its hash, so a data set that changes in its place
never meets old files, and two copies of one data set share theirs. A file on this machine is read where it is. Of each file the
cache remembers the boot, size, inode and times at its last check, so it is checked again when something has written to it, and
after the next boot, which finds bits that flipped on the disk. A damaged copy is fetched again; a damaged file of this machine is
an error. The cache holds at most max_bytes, downloads included, and evicts the least recently used file first. An evicted file
that a process has mapped stays readable there, and its disk space is freed when that process unmaps it.

    shards/HASH.arrow  fetched      shards/HASH.tmp  being fetched      shards/HASH.lock, checked/MARK  of the last check, 16 bytes

Any number of processes can share the cache: a lock per file lets one fetch it while the others wait, at most half an hour. Cost:
the download, and hashing at 1 GB/s.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from rec_dist.data.dataset.schema import PREPARE_AGAIN
from rec_dist.errors import UserError
from rec_dist.storage.checksums import FileEntry
from rec_dist.storage.files import fingerprint, make_folder, put_in_place, sha256
from rec_dist.storage.location import Location, NoSuchFileError, reason

logger = logging.getLogger(__name__)

_SETTLED_SECONDS = 2.0  # a file that changed more recently could change again with the same time stamp
_WAIT_SECONDS = 0.05  # pause before looking again for room that downloads of other processes hold
_LOCKED_SECONDS = 1800.0  # for another process to fetch or hash a file, as cluster.hang_seconds
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_OWN = re.compile(r"[0-9a-f]{64}\.(arrow|tmp)")  # what this cache may remove; data.cache_dir may name a folder with other files


class NodeCache:
    """The cache in `folder`, with at most max_bytes of fetched files."""

    def __init__(self, folder: Path, max_bytes: int, *, locked_seconds: float = _LOCKED_SECONDS) -> None:
        self.folder, self.max_bytes, self._locked_seconds = folder, max_bytes, locked_seconds
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
        lock = path.with_suffix(".lock")
        with ExitStack() as held:
            with self._guarded():
                held.enter_context(self._lock(lock))
                if not self._is_whole(path, entry):
                    self._fetch(location, entry, path)
                    lock.write_bytes(_mark(path, entry))
                self.touch(path)
            yield path

    def _is_whole(self, path: Path, entry: FileEntry) -> bool:
        """Whether a fetched file is there with the bytes of the manifest. Hashes it if this boot has not. Holds its lock."""
        lock = path.with_suffix(".lock")
        if not path.is_file() or path.stat().st_size != entry.bytes:
            return False
        mark = _mark(path, entry)
        if lock.read_bytes() != mark:
            if sha256(path) != entry.sha256:
                logger.warning(f"{path} was damaged after it was fetched; it is fetched again")
                return False
            lock.write_bytes(mark)
        return True

    def damaged(self, entries: Iterable[FileEntry]) -> list[str]:
        """Hashes what the cache holds of these files, and removes what is damaged. Returns a phrase for each."""
        found = []
        for entry in entries:
            path = self._shards / f"{entry.sha256}.arrow"
            if not path.is_file():
                continue
            with self._guarded(), self._lock(path.with_suffix(".lock")):
                if path.is_file() and (fault := entry.damage(path.stat().st_size, sha256(path))):
                    path.unlink()
                    found.append(f"{path} {fault}")
        return found

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
        """Marks a fetched file as used now, by the time of its lock: its own times say whether it has changed."""
        with suppress(FileNotFoundError):
            os.utime(path.with_suffix(".lock"))

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
        for path, stat in sorted(files, key=lambda item: _last_used(item[0])):
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
        place = self._marks / fingerprint([str(path.resolve()), entry.sha256])
        with self._guarded(), self._lock(place):
            mark = _mark(path, entry)
            if place.read_bytes() == mark:
                return
            _compare(str(path), entry, stat.st_size, sha256(path))
            if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS:
                place.write_bytes(mark)

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
        """Holds the lock of a file. Yields False if `wait` is false and another process holds it.

        Raises UserError if another process holds it for longer than locked_seconds.
        """
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield self._locked(handle, path, wait=wait)
        finally:
            os.close(handle)

    def _locked(self, handle: int, path: Path, *, wait: bool) -> bool:
        until, pause = time.monotonic() + self._locked_seconds, 0.001
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not wait:
                    return False
            if time.monotonic() > until:
                raise UserError(
                    f"data.cache_dir: another process has held {path} for {self._locked_seconds:g} s; end it (`fuser {path}` "
                    "names it), or name another data.cache_dir"
                )
            time.sleep(pause)
            pause = min(2 * pause, _WAIT_SECONDS)


def _mark(path: Path, entry: FileEntry) -> bytes:
    """What is remembered of a checked file: equal as long as this boot lasts and nothing wrote to the file."""
    stat = path.stat()
    return fingerprint([_boot(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, entry.sha256]).encode()


@cache
def _boot() -> str:
    """What names this boot of the machine; empty where /proc does not say."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _last_used(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.with_suffix(".lock").stat().st_mtime_ns
    return 0


def _compare(name: str, entry: FileEntry, size: int, found: str) -> None:
    if damage := entry.damage(size, found):
        raise UserError(f"{name} {damage}; {PREPARE_AGAIN}")
