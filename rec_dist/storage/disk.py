"""Disk faults: recognises the exceptions that report one, and turns them into one line with the place, the fault and the remedy.

Whoever writes next meets a full disk, a lost permission or a broken device: Python, Arrow or safetensors, whose exceptions
differ. `writing` turns all of them into DiskError.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rec_dist.errors import DiskError

_WAYS_OUT = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount that disk writable, or choose another folder",
    errno.EACCES: "make the folder writable for this user, or choose another",
    errno.EPERM: "make the folder writable for this user, or choose another",
    errno.EIO: "look at that disk (dmesg), or choose another",
    errno.ESTALE: "mount that disk again, or choose another",
}
_CHECKPOINTS = "checkpoints"
_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors reports the system's errors


def disk_fault(fault: BaseException) -> int | None:
    """The errno of a disk fault, or None for any other exception."""
    number = fault.errno if isinstance(fault, OSError) else None
    found = _RUST.search(str(fault))
    if number is None and found:
        number = int(found.group(1))
    return number if number in _WAYS_OUT else None


def describe(number: int, path: Path | str | None, or_else: str = "") -> str:
    """One line with the place, the fault, the free space and the remedy. or_else: another remedy."""
    place = "the disk" if path is None else str(path)
    free = ""
    if path is not None and number in (errno.ENOSPC, errno.EDQUOT):
        folder = next((f for f in Path(path).absolute().parents if f.is_dir()), Path("/"))
        usage = shutil.disk_usage(folder)
        free = f" ({usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB free)"
    way_out = _WAYS_OUT[number]
    if number == errno.ENOSPC and path is not None and _in_a_run_with_checkpoints(Path(path).absolute()):
        way_out += ", or lower checkpoint.keep"
    way_out += f", or {or_else}" if or_else else ""
    return f"{place}: {os.strerror(number)}{free}; {way_out}, then run the same command again"


def _in_a_run_with_checkpoints(path: Path) -> bool:
    """Whether checkpoints may be what fills the disk: not for a fitted run, a ranking or an export."""
    return path.name == _CHECKPOINTS or any(
        above.name == _CHECKPOINTS or (above / _CHECKPOINTS).is_dir() for above in path.parents[:3]
    )


def as_disk_error(fault: BaseException, path: Path | str | None = None, or_else: str = "") -> DiskError | None:
    """Returns a disk fault as a DiskError about `path` (or the file that the fault names), and None for any other exception.

    or_else: as in describe.
    """
    if isinstance(fault, DiskError):
        return fault
    number = disk_fault(fault)
    if number is None:
        return None
    return DiskError(describe(number, path or getattr(fault, "filename", None), or_else))


@contextmanager
def writing(path: Path, or_else: str = "") -> Iterator[None]:
    """Inside, raises a disk fault as DiskError about `path`; lets any other exception through. or_else: as in describe."""
    try:
        yield
    except Exception as fault:
        error = as_disk_error(fault, path, or_else)
        if error is None or error is fault:
            raise
        raise error from fault
