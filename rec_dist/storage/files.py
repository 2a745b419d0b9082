"""Files that are whole or absent: written under a temporary name, synced, renamed.

Why: a run dies at any moment, and a half-written manifest or config is worse than none. Cost: one fsync a file.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec_dist.errors import UserError
from rec_dist.storage.disk import writing

_CHUNK_BYTES = 1 << 20
_UMASK = os.umask(0)
os.umask(_UMASK)  # there is no other way to ask for it; at import, while nobody else makes files


def is_remote(path: str | Path) -> bool:
    """Whether a path names a file system by its scheme. file:// is this machine's."""
    return "://" in str(path) and not str(path).startswith("file://")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder; on success it is synced and renamed to `path`, on error removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
    except OSError as fault:
        fault.filename = fault.filename or str(path)  # a write that fails does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def readable(folder: Path) -> None:
    """Gives the files right in `folder` the mode that the umask asks for: safetensors writes its own for this user alone (0600)."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~_UMASK)


def misplaced(folder: Path, *, files: Iterable[str], folders: Iterable[str]) -> str | None:
    """What stands in `folder` as a folder where a file belongs, or the other way round: a phrase that names it, or None."""
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
    """Writes `value` as indented JSON, keys in the order given. NaN and infinity are refused."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What write_json writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, line: str) -> None:
    """Adds `line` to a file, whole or not at all: half a line of a full disk is taken back. Raises DiskError."""
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
    """The JSON object in `path`, a file of ours. UserError with the way out: it has been damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"{path} cannot be read ({' '.join(str(fault).split())}); {way_out}") from fault
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; {way_out}")
    return value


def lock(path: Path) -> int:
    """Holds `path` for this process until the handle it returns is closed. BlockingIOError: another process does."""
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
    """A short hash of a JSON-able value, independent of key order: says whether two configurations are the same."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sampled_fingerprint(folder: Path, pattern: str) -> str:
    """A short hash of the files in `folder` that match: names, sizes and 64 evenly spaced blocks of 64 KiB each.

    Milliseconds even for a model of hundreds of gigabytes; tells models apart, and does not prove that every byte is the same.
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
