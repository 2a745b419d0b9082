"""Intermediate files: numpy columns in Arrow files with one record batch per part, and single arrays.

They are in a folder that all processes see, where they are memory-mapped, or at a URI. From a URI a job fetches only the parts
that it reads, so machines need no disk in common.
"""

import fnmatch
import io
import logging
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rec_dist.errors import UserError
from rec_dist.storage.disk import writing
from rec_dist.storage.files import beside
from rec_dist.storage.location import Location, NoSuchFileError
from rec_dist.storage.uri import is_remote

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

PREFIX = ".work-"  # of the folder below a URI
_LEFT_OVER_SECONDS = 86400.0  # since the last file of an attempt was written, after which it counts as killed


@dataclass(frozen=True)
class Work:
    """The intermediate files of one attempt, in a local folder or in a folder below a URI. Jobs carry it.

    place: the local folder, or the URI of data.path. attempt: names the attempt, and the folder below a URI.
    """

    place: str
    attempt: str

    @property
    def is_remote(self) -> bool:
        """Whether the files are at a URI."""
        return is_remote(self.place)

    def __truediv__(self, name: str) -> "WorkFile":
        return WorkFile(self, name)

    def drop(self, *patterns: str) -> None:
        """Removes the files whose names match."""
        if not self.is_remote:
            for path in [path for pattern in patterns for path in Path(self.place).glob(pattern)]:
                path.unlink()
            return
        location, below = _location(self.place), f"{PREFIX}{self.attempt}/"
        for name in location.tree():
            if any(fnmatch.fnmatchcase(name, below + pattern) for pattern in patterns):
                location.remove(name)

    def remove(self) -> None:
        """Removes all files that are below a URI, and their folder. A fault is a warning: another may be why the attempt ends."""
        try:
            _location(self.place).remove_folder(f"{PREFIX}{self.attempt}")
        except UserError as fault:
            logger.warning(f"{fault}; remove that folder, or a later prepare does so after a day")


def drop_left_over(place: str) -> None:
    """Removes what killed attempts left below a URI: those that have written nothing for a day."""
    location, newest = _location(place), dict[str, float]()
    for name, stored in location.tree().items():
        if name.startswith(PREFIX):
            folder = name.partition("/")[0]
            newest[folder] = max(stored.written, newest.get(folder, 0.0))
    for folder, written in newest.items():
        if written < time.time() - _LEFT_OVER_SECONDS:
            location.remove_folder(folder)


@dataclass(frozen=True)
class WorkFile:
    """One intermediate file."""

    work: Work
    name: str

    @property
    def path(self) -> Path:
        """The file in a local folder. Raises UserError if this machine does not have the folder."""
        folder = Path(self.work.place)
        if not folder.is_dir():
            raise UserError(
                f"data.path: the machine {socket.gethostname()} runs a job of prepare and has no folder {folder}; set data.path to "
                "a URI (s3://bucket/prefix), or to a folder that all machines of the cluster see."
            )
        return folder / self.name

    @property
    def location(self) -> Location:
        """The URI of data.path, where `below` is the name of the file."""
        return _location(self.work.place)

    @property
    def below(self) -> str:
        """The name of the file below the URI."""
        return f"{PREFIX}{self.work.attempt}/{self.name}"


@lru_cache(maxsize=8)
def _location(place: str) -> Location:
    return Location(place)


@contextmanager
def whole_or_absent(path: Path, work: Work | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`, or in the local folder of `work`, which becomes `path` at the end. It is not synced.

    Each call has a name of its own: a job that was started again on another machine may still run on a machine that counts as lost.
    """
    temporary = beside(path if work is None else (work / path.name).path)
    yield temporary
    temporary.replace(path)


def to_arrow(values: Array | pa.Array) -> pa.Array:
    """Converts a numpy column without a copy; booleans become bytes."""
    if not isinstance(values, np.ndarray):
        return values
    return pa.array(values.view(np.uint8) if values.dtype == np.bool_ else values)


def write_batches(file: WorkFile, batches: Iterable[Mapping[str, Any] | pa.RecordBatch]) -> None:
    """Writes the columns of each part, which all have the same names and types.

    The file appears whole or not at all, so that a job can be run again. On its way to a URI it is held in memory.
    """
    if file.work.is_remote:
        held = pa.BufferOutputStream()
        _write(held, batches)
        file.location.write(held.getvalue(), file.below)
        return
    with whole_or_absent(file.path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        _write(sink, batches)


def _write(sink: Any, batches: Iterable[Mapping[str, Any] | pa.RecordBatch]) -> None:
    writer = None
    for part in batches:
        batch: Any = part
        if isinstance(part, Mapping):
            batch = pa.RecordBatch.from_pydict({name: to_arrow(values) for name, values in part.items()})
        writer = writer or pa.ipc.new_file(sink, batch.schema)
        writer.write_batch(batch)
    assert writer is not None, "there is at least one part"
    writer.close()


def read_batch(file: WorkFile, index: int = 0) -> pa.RecordBatch:
    """Reads one part; its columns are views of the mapped file, or of the bytes that were fetched."""
    if file.work.is_remote:
        return file.location.use(file.below, lambda opened: pa.ipc.open_file(opened).get_batch(index))
    return pa.ipc.open_file(pa.memory_map(str(file.path))).get_batch(index)


def column(batch: pa.RecordBatch, name: str) -> Array:
    """One numeric column as numpy, read-only and without a copy."""
    values: Array = batch.column(name).to_numpy(zero_copy_only=True)
    return values


def save_array(file: WorkFile, values: Array) -> None:
    """Writes an array for load_array."""
    if file.work.is_remote:
        held = io.BytesIO()
        np.save(held, values)
        file.location.write(pa.py_buffer(held.getbuffer()), file.below)
        return
    with whole_or_absent(file.path) as temporary, temporary.open("wb") as sink:
        np.save(sink, values)


def load_array(file: WorkFile) -> Array:
    """Memory-maps an array that save_array wrote; one at a URI through a temporary file, which goes with the array."""
    values: Array
    if file.work.is_remote:
        with tempfile.NamedTemporaryFile(prefix="rec-dist-") as fetched:
            with writing(Path(fetched.name)):  # which may be on another disk than what the command writes
                file.location.copy(file.below, Path(fetched.name))
            values = np.load(fetched.name, mmap_mode="r")
    else:
        values = np.load(file.path, mmap_mode="r")
    return values


def find_array(file: WorkFile) -> Array | None:
    """What load_array returns; None if no array was saved."""
    try:
        return load_array(file)
    except (FileNotFoundError, NoSuchFileError):
        return None
