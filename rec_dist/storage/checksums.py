"""files.json in a folder: bytes and SHA-256 of every other file there, so that a byte that flips later is found when it is read.

Weights have no checksum of their own: with one bit changed they load, and answer a little wrong. Cost: 1 s a GB on one core, when they
are written and before each use; nothing for an adapter. For whole models too: a minute for tens of GB, before hours of work with them.
"""

from pathlib import Path

from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.storage.files import read_object, sha256, write_json

CHECKSUMS_NAME = "files.json"


def write_checksums(folder: Path) -> None:
    """Writes files.json of what lies in `folder` now."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS_NAME)
    write_json(folder / CHECKSUMS_NAME, {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files})


def broken(folder: Path) -> list[str]:
    """What is not as files.json says, a phrase each. Empty too where there is none: a model of elsewhere, or of an early version.

    Files that came later are nobody's fault. UserError: files.json is damaged.
    """
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return []
    files = read_object(path, TRAIN_AGAIN)
    try:
        wanted = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError) as fault:
        raise UserError(f"{path} has other fields than were written ({fault!r}); {TRAIN_AGAIN}") from fault
    problems = ((name, _problem(folder / name, *facts)) for name, facts in wanted.items())
    return [f"{name} {problem}" for name, problem in problems if problem is not None]


def _problem(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, not {size}"
    return None if sha256(path) == digest else "has changed since it was written (other hash)"


def verify_checksums(folder: Path) -> None:
    """UserError: a file of a run's model/ is not the one that was written. Nothing is checked where there is no files.json."""
    if problems := broken(folder):
        raise UserError(f"{folder}: {problems[0]}; {TRAIN_AGAIN}")
