"""Temporary folders in a cache, such as copies of a source, which may be as large as the data: what a killed process leaves must go.

A folder goes with its user. One that a kill has left goes when anybody next asks for one with the same prefix in the same place, a
day after it was made: until then it may be that of a process on another machine which has not locked it yet.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rec_dist.storage.files import lock, make_folder

_LOCK = ".lock"
_LEFT_OVER_SECONDS = 86400.0


@contextmanager
def temporary_folder(cache: Path, prefix: str) -> Iterator[Path]:
    """An empty folder below `cache`, in a folder whose name begins with `prefix`. Raises OSError."""
    make_folder(cache, "owner")
    _drop_left_over(cache, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cache) as name:
        folder, held = Path(name) / "files", None
        folder.mkdir()
        with suppress(OSError):  # a file system without locks: nobody can lock the folder to remove it either
            held = lock(Path(name) / _LOCK)
        try:
            yield folder
        finally:
            if held is not None:
                os.close(held)


def _drop_left_over(cache: Path, prefix: str) -> None:
    """Removes the folders with this prefix that are a day old and whose user does not live any more."""
    for path in cache.glob(f"{prefix}*"):
        with suppress(OSError):  # it is in use, or has just gone
            if path.stat().st_mtime < time.time() - _LEFT_OVER_SECONDS:
                held = lock(path / _LOCK)
                shutil.rmtree(path, ignore_errors=True)
                os.close(held)
