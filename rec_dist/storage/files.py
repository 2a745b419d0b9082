"""Atomic writes of files and folders, reads of our own JSON files, locks, and hashes of files and values.

Everything that must outlive a power cut is written in one way: under a temporary name, synced, renamed, and then the folder is
synced, which holds the new name. A name therefore has its old contents or its new ones, whole, and what is done stays done when a
later step begins. Cost: two fsyncs per file; for a folder one per file and folder in it, and one for the folder above.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rec_dist.errors import UserError, one_line
from rec_dist.storage.disk import writing

_CHUNK_BYTES = 1 << 20
Access = Literal["owner", "group", "everyone"]  # who may enter a folder of runs or data
_MODES = {"owner": 0o700, "group": 0o750, "everyone": 0o755}
_BESIDE = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_UMASK = os.umask(0)
os.umask(_UMASK)  # the only way to read it; done at import, before other threads create files


def beside(path: Path) -> Path:
    """A hidden name in the same folder, .NAME.XXXXXXXX.tmp, which no other process uses.

    Random, because process ids are not: in containers every command is process 1, also two that write to one shared folder.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def sync(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # CIFS and FUSE may know no sync of folders
            raise
    finally:
        os.close(handle)


def make_folder(path: Path, access: Access | None = None) -> None:
    """Makes a folder and those above it, if they are missing, so that their names are on the disk. Raises OSError.

    access: who may enter `path`, if this call makes it, whatever the umask is. None: who the umask lets in.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(0o777 if access is None else _MODES[access], exist_ok=True)
    if access is not None and path in missing:
        path.chmod(_MODES[access])
    for folder in missing:
        sync(folder.parent)


def fresh_folder(path: Path) -> None:
    """Makes an empty folder, in place of one that an earlier attempt left, and syncs its name. Raises OSError."""
    shutil.rmtree(path, ignore_errors=True)
    make_folder(path.parent)
    path.mkdir()
    sync(path.parent)


def put_in_place(made: Path, path: Path, *, replace: bool = True) -> None:
    """Syncs the file or folder `made` with all that is in it, and renames it to `path` on the same file system.

    A file replaces a file in one step. What is in the way of a folder first gets a hidden name beside `path`, and is removed once
    the new one stands. Raises OSError; with replace=False also if a folder that is not empty stands at `path`.
    """
    for top, _, names in os.walk(made):
        for file in (Path(top) / name for name in names):
            if not file.is_symlink():
                sync(file)
        sync(Path(top))
    if not made.is_dir():
        sync(made)
    old = None
    if replace and made.is_dir() and os.path.lexists(path):
        old = beside(path)
        path.rename(old)
    try:
        made.replace(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    sync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() and not old.is_symlink() else old.unlink()


def is_left_over(path: Path) -> bool:
    """Whether `path` has one of the names of `beside`: a file or folder whose writer was killed, unless one writes now."""
    return _BESIDE.fullmatch(path.name) is not None


def remove_left_over(folder: Path) -> None:
    """Removes what killed writers left in `folder`. Only for who holds the folder: no other process may write there."""
    for path in folder.glob(".*.tmp"):
        if is_left_over(path):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder. On success, it becomes `path` and is on the disk; on error, removes it."""
    make_folder(path.parent)
    temporary = beside(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)
        put_in_place(temporary, path)
    except OSError as fault:
        fault.filename = fault.filename or str(path)  # a failed write does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def readable(folder: Path) -> None:
    """Sets the mode of the files directly in `folder` to what the umask asks for; safetensors makes its files private (0600)."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~_UMASK)


def misplaced(folder: Path, *, files: Iterable[str], folders: Iterable[str]) -> str | None:
    """Returns a phrase that names a folder where a file belongs, or a file where a folder belongs; None if there is neither."""
    for names, is_right, what in ((files, Path.is_file, "no file"), (folders, Path.is_dir, "no folder")):
        for path in (folder / name for name in names):
            if path.exists() and not is_right(path):
                return f"{path} is {what}"
    return None


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path`, whole or not at all; it is on the disk when this returns."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON and keeps the order of keys. Raises ValueError for NaN and infinity."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text that write_json writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, line: str) -> None:
    """Appends `line` to a file, whole or not at all: if the disk fills up, removes the half line again. Raises DiskError.

    Not synced: a power cut may take the last lines.
    """
    data = f"{line}\n".encode()
    with writing(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                done = 0
                while done < len(data):
                    done += os.write(handle, data[done:])
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


def read_object(path: Path, way_out: str) -> dict[str, Any]:
    """Reads the JSON object in `path`, one of our own files. Raises UserError with `way_out` if the file is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"{path} cannot be read ({one_line(fault)}); {way_out}") from fault
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; {way_out}")
    return value


def lock(path: Path, *, seconds: float = 0.0) -> int:
    """Locks `path` until the returned handle is closed. Raises BlockingIOError if another process holds the lock for `seconds`."""
    handle, until = os.open(path, os.O_RDWR | os.O_CREAT), time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.02)
    except BaseException:
        os.close(handle)
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex. About 1 GB/s on one core."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """A short hash of a value that JSON can hold, independent of key order. Equal values have equal fingerprints."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sampled_fingerprint(folder: Path, pattern: str) -> str:
    """A short hash of the files in `folder` that match `pattern`: their names, sizes and 64 evenly spaced blocks of 64 KiB each.

    It takes milliseconds even for hundreds of gigabytes. It tells models apart, but does not prove that every byte is the same.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as handle:
            for block in range(64):
                handle.seek(block * max(size - (1 << 16), 0) // 63)
                digest.update(handle.read(1 << 16))
    return digest.hexdigest()[:16]
