"""The safetensors files of a state: which file holds which tensor, and a thread per rank that writes, hashes and syncs them.

The layout follows from names and shapes alone, before the first tensor is available. So host memory holds only tensors that
wait to be written, not the whole state. The number of ranks decides who writes a file, but not what it holds.
"""

import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rec_dist.storage.checksums import FileEntry
from rec_dist.storage.disk import as_disk_error

# Small enough that eight ranks share the work from 0.7e9 trainable weights on. A larger tensor gets a file of its own.
MAX_FILE_BYTES = 1 << 30
PATTERN = "state*.safetensors"
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A float32 tensor of the state."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of its values."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class StateFile:
    """A file and its tensors, in order."""

    name: str
    entries: tuple[Entry, ...]

    def header(self) -> bytes:
        """The bytes before the values in a safetensors file: a length, then JSON with dtype, shape and place of each tensor."""
        places, at = {}, 0
        for entry in self.entries:
            places[entry.name] = {"dtype": "F32", "shape": entry.shape, "data_offsets": [at, at + entry.num_bytes]}
            at += entry.num_bytes
        text = json.dumps({"__metadata__": {"format": "pt"}, **places}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def lay_out(entries: Sequence[Entry], max_bytes: int) -> list[StateFile]:
    """Distributes `entries` in order over files of at most max_bytes of values; a single file is named state.safetensors."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.num_bytes
    if len(groups) == 1:
        return [StateFile("state.safetensors", tuple(groups[0]))]
    return [StateFile(f"state-{n:05d}-of-{len(groups):05d}.safetensors", tuple(g)) for n, g in enumerate(groups, start=1)]


def in_turn(files: Sequence[StateFile], world_size: int) -> Iterator[tuple[int, Entry]]:
    """Yields (rank that writes it, entry), one tensor per rank in turn, so that all ranks write at once.

    Rank f % world_size writes file f.
    """
    for first in range(0, len(files), world_size):
        wave = files[first : first + world_size]
        for number in range(max(len(file.entries) for file in wave)):
            for rank, file in enumerate(wave):
                if number < len(file.entries):
                    yield rank, file.entries[number]


@dataclass(frozen=True)
class Written:
    """The files that a rank wrote, and the disk fault that stopped it, if any."""

    files: list[FileEntry]
    fault: str | None


class StateWriter:
    """Writes `files` in a thread, from tensors that put() gets in order. After a fault it drops the rest and never blocks.

    asynchronous: copies the tensors, and all of them may wait in host memory. Otherwise at most two wait, and no tensor may
    change until finish() returns.
    """

    def __init__(self, folder: Path, files: Sequence[StateFile], *, asynchronous: bool) -> None:
        self._folder, self._files, self._asynchronous = folder, files, asynchronous
        self._queue: queue.Queue[Tensor] = queue.Queue(maxsize=0 if asynchronous else 2)
        self._written: list[FileEntry] = []
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def put(self, tensor: Tensor) -> None:
        """Hands over the next tensor of the files, on any device."""
        self._queue.put(tensor.detach().to("cpu", torch.float32, copy=self._asynchronous).contiguous())

    @property
    def done(self) -> bool:
        """Whether finish() would return at once."""
        return not self._thread.is_alive()

    def finish(self) -> Written:
        """Waits until all files are on disk or a write has failed. Raises any exception that is not a disk fault."""
        self._thread.join()
        if self._fault is None:
            return Written(self._written, None)
        error = as_disk_error(self._fault, self._folder)
        if error is None:
            raise self._fault
        return Written([], str(error))

    def _run(self) -> None:
        left = sum(len(file.entries) for file in self._files)
        try:
            for file in self._files:
                handle = os.open(self._folder / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                try:
                    sink = _Sink(handle)
                    sink.write(memoryview(file.header()))
                    for entry in file.entries:
                        tensor = self._queue.get()
                        left -= 1
                        assert tensor.shape == entry.shape, f"{entry.name}: {tuple(tensor.shape)} in place of {entry.shape}"
                        sink.write(tensor.view(-1).view(torch.uint8).numpy().data)
                    os.fsync(handle)
                    self._written.append(FileEntry(file.name, sink.size, sink.digest.hexdigest()))
                finally:
                    os.close(handle)
        except BaseException as fault:  # finish() raises it, in the thread that can tell the other ranks
            self._fault = fault
            for _ in range(left):
                self._queue.get()


class _Sink:
    """Writes bytes to a file and keeps their number and hash."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            self.digest.update(chunk)
            done = 0
            while done < len(chunk):
                done += os.write(self._handle, chunk[done:])
            self.size += len(chunk)
