"""The safetensors files of a state: which tensor stands in which, and one thread a rank that writes, hashes and syncs them.

Laid out before the first tensor is at hand, from names and shapes alone, so host memory holds what waits to be written and not the
state. What a file holds does not depend on the number of ranks; who writes it does.
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

from rec_dist.storage.disk import as_disk_error

MAX_FILE_BYTES = (
    1 << 30
)  # small enough that eight ranks have work from 0.7e9 trainable weights on; a larger tensor has its own file
PATTERN = "state*.safetensors"
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A float32 tensor of the state."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class StateFile:
    """A file and the tensors in it, in their order there."""

    name: str
    entries: tuple[Entry, ...]

    def header(self) -> bytes:
        """What safetensors puts before the values: a length, then JSON with dtype, shape and place of each tensor."""
        places, at = {}, 0
        for entry in self.entries:
            places[entry.name] = {"dtype": "F32", "shape": entry.shape, "data_offsets": [at, at + entry.num_bytes]}
            at += entry.num_bytes
        text = json.dumps({"__metadata__": {"format": "pt"}, **places}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def lay_out(entries: Sequence[Entry], max_bytes: int) -> list[StateFile]:
    """Files of at most max_bytes of values in the order of `entries`; state.safetensors where one is enough."""
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
    """(rank that writes it, entry): one tensor for each rank in turn, so that all write at once. File f is rank f % world_size's."""
    for first in range(0, len(files), world_size):
        wave = files[first : first + world_size]
        for number in range(max(len(file.entries) for file in wave)):
            for rank, file in enumerate(wave):
                if number < len(file.entries):
                    yield rank, file.entries[number]


@dataclass(frozen=True)
class Written:
    """What a rank wrote: name -> (bytes, SHA-256), and what the disk had against it."""

    files: dict[str, tuple[int, str]]
    fault: str | None


class StateWriter:
    """Writes `files` in a thread from tensors given in their order. Never blocks on a fault: what comes after one is dropped.

    asynchronous: tensors are copied and may all wait in host memory; else two wait at most, and must not change until finish().
    """

    def __init__(self, folder: Path, files: Sequence[StateFile], *, asynchronous: bool) -> None:
        self._folder, self._files, self._asynchronous = folder, files, asynchronous
        self._queue: queue.Queue[Tensor] = queue.Queue(maxsize=0 if asynchronous else 2)
        self._written: dict[str, tuple[int, str]] = {}
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def put(self, tensor: Tensor) -> None:
        """The next tensor of the files, on any device."""
        self._queue.put(tensor.detach().to("cpu", torch.float32, copy=self._asynchronous).contiguous())

    @property
    def done(self) -> bool:
        """Whether finish() would return at once."""
        return not self._thread.is_alive()

    def finish(self) -> Written:
        """Waits until all is on disk, or has failed. An exception that is no fault of the disk is raised."""
        self._thread.join()
        if self._fault is None:
            return Written(self._written, None)
        error = as_disk_error(self._fault, self._folder)
        if error is None:
            raise self._fault
        return Written({}, str(error))

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
                    self._written[file.name] = (sink.size, sink.digest.hexdigest())
                finally:
                    os.close(handle)
        except BaseException as fault:  # met in finish(), by the thread that may tell the other ranks
            self._fault = fault
            for _ in range(left):
                self._queue.get()


class _Sink:
    """A file that knows the hash and number of the bytes it was given."""

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
