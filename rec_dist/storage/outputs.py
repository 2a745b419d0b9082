"""A file or folder that the user tells a command to write: checked before anything is computed, so that no hour ends in a refusal."""

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from rec_dist.errors import UserError
from rec_dist.storage.disk import disk_fault

_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)  # of the faults of a disk those that another path mends


def check_output(path: Path, key: str, *, folder: bool = False, may_exist: bool = False) -> None:
    """Leaves nothing behind. Folders that are missing above `path` are made by whoever writes, so they are no fault.

    key: what the user named `path` with. may_exist: a folder that is there already is written into.
    UserError: it exists, is of the other kind, lies below a file, is no path, or cannot be written. DiskError's causes go through.
    """
    what = "folder" if folder else "file"
    try:
        fault = _fault(path, what, may_exist=may_exist)
    except ValueError as error:
        fault = f"is no usable path ({error}); choose another {what}"
    except OSError as error:
        if disk_fault(error) not in (None, *_CLOSED):
            raise
        mend = ", or make that place writable" if error.errno in _CLOSED else ""
        fault = f"cannot be written: {error.strerror}; choose another {what}{mend}"
    if fault is not None:
        shown = str(path)[:200].replace("\0", "\\0")
        raise UserError(f"{key} ({shown}) {fault}")


def _fault(path: Path, what: str, *, may_exist: bool) -> str | None:
    """What is wrong and the way out, or None."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)  # ValueError for what no name can hold; pathlib takes such a path for one that is not there
    if not may_exist:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path.absolute().with_name(f".{path.name}.{os.getpid()}.work"))  # it is made under a longer name, and renamed
    if path.is_symlink() and not path.exists():
        return f"is a link to nothing; remove it, or choose another {what}"
    if path.exists():
        if path.is_dir() != (what == "folder"):
            return f"is {'a folder' if path.is_dir() else 'no folder'}; choose another {what}"
        if not may_exist:
            return f"exists; choose a {what} that does not"
    above = next(place for place in (path, *path.absolute().parents) if place.exists() or place.is_symlink())
    if not above.is_dir():
        return f"lies below {above}, which is no folder; choose another {what}"
    with tempfile.TemporaryFile(dir=above):  # tried, not asked: a mount may be read-only, or of a kind that takes no files
        return None
