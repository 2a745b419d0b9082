"""Checks the output paths of a command before it starts expensive work."""

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from rec_dist.errors import UserError
from rec_dist.storage.disk import disk_fault
from rec_dist.storage.files import beside

_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)  # disk faults that another path would avoid


def check_output(path: Path, key: str, *, folder: bool = False, may_exist: bool = False) -> None:
    """Raises UserError if `path` cannot become a new file (or folder). Leaves nothing behind.

    key: names `path` in messages. may_exist: allows an existing folder, which the command writes into. Missing parent folders
    are fine, since the command creates them. Errors that are disk faults, such as a full disk, pass through as OSError.
    """
    what = "folder" if folder else "file"
    try:
        fault = _fault(path, what, may_exist=may_exist)
    except ValueError as error:
        fault = f"is not a usable path ({error}); choose another {what}"
    except OSError as error:
        if disk_fault(error) not in (None, *_CLOSED):
            raise
        mend = ", or make that place writable" if error.errno in _CLOSED else ""
        fault = f"cannot be written: {error.strerror}; choose another {what}{mend}"
    if fault is not None:
        shown = str(path)[:200].replace("\0", "\\0")
        raise UserError(f"{key} ({shown}) {fault}")


def _fault(path: Path, what: str, *, may_exist: bool) -> str | None:
    """The fault and the way out, or None."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)  # raises ValueError for an impossible name, which pathlib treats as missing
    if not may_exist:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(beside(path.absolute()).with_suffix(".work"))  # the longer temporary name
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
    with tempfile.TemporaryFile(dir=above):  # a mount may be read-only or take no files: only a try can tell
        return None
