"""Atomic file writes, reads of our own JSON files, locks, and hashes of files and values.

A file is written under a temporary name, synced and renamed, because a run can die at any moment and half a manifest is worse
than none. Cost: one fsync per file.
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec_dist.errors import UserError
from rec_dist.storage.disk import writing

_CHUNK_BYTES = 1 << 20
_UMASK = os.umask(0)
os.umask(_UMASK)  # the only way to read it; done at import, before other threads create files


def beside(path: Path) -> Path:
    """A hidden name in the same folder, .NAME.XXXXXXXX.tmp, which no other process uses.

    Random, because process ids are not: in containers every command is process 1, also two that write to one shared folder.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder. On success, syncs it and renames it to `path`; on error, removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
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
    """Writes `text` (UTF-8) to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON and keeps the order of keys. Raises ValueError for NaN and infinity."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text that write_json writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, line: str) -> None:
    """Appends `line` to a file, whole or not at all: if the disk fills up, removes the half line again. Raises DiskError."""
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
        raise UserError(f"{path} cannot be read ({' '.join(str(fault).split())}); {way_out}") from fault
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; {way_out}")
    return value


def lock(path: Path) -> int:
    """Locks `path` until the returned handle is closed. Raises BlockingIOError if another process holds the lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle


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
