"""Processes that build the steps of a worker, each with a pipe of its own: train.dataloader_num_workers.

Why not torch's DataLoader: its processes send through one pipe. One that is killed in the middle of a batch, which is longer than a
pipe holds, leaves the reader waiting for the rest for ever, since the others keep that pipe open. Through shared memory it sends a
file descriptor a tensor, of which a step has more than a process may open, or more bytes than a container's /dev/shm has.

They are forked, so they share this process's memory, and must not touch a GPU. A step is a pure function of its number: process i
of n makes the steps i, i + n, ... Cost: a pickle of each step, 0.5 MB for a micro-batch of 8,192 rows.
"""

import atexit
import ctypes
import gc
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from rec_dist.errors import DiskError, UnreachableError, UserError, WorkerFailedError
from rec_dist.storage.disk import as_disk_error

_OURS = (UserError, DiskError, UnreachableError, MemoryError)  # mean the same to whoever runs the step, traceback or not
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class LoaderProcesses:
    """build(step) of each of `steps`, in up to num_workers processes that are forked here. Call `end` in the end."""

    def __init__(self, build: Callable[[int], Any], steps: Sequence[int], num_workers: int) -> None:
        context = multiprocessing.get_context("fork")
        self._made: list[tuple[Any, Connection]] = []
        atexit.register(self.end)  # multiprocessing sends SIGTERM at exit, then waits
        # Blocked there for good: Ctrl-C and a scheduler's SIGTERM reach every process of a job, and are for the worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for first in range(min(num_workers, len(steps))):
                reader, writer = context.Pipe(duplex=False)
                readers = [*(other for _, other in self._made), reader]
                process = context.Process(target=_serve, args=(build, steps[first::num_workers], writer, readers), daemon=True)
                process.start()
                writer.close()  # so that the end of the process is the end of what can be read
                self._made.append((process, reader))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._turns = cycle(self._made)

    def next(self) -> Any:
        """The next step. Raises our own errors as they are, and others, or an end before it, as WorkerFailedError."""
        process, reader = next(self._turns)
        try:
            made = reader.recv()
        except (EOFError, OSError):
            process.join()
            code = process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerFailedError(
                f"train.dataloader_num_workers: process {process.pid}, which builds batches, {how}; where the machine's memory has "
                "run out, lower it"
            ) from None
        if isinstance(made, Exception):
            raise made
        return made

    def end(self) -> None:
        """End the processes at once, whatever they do. Another thread that waits in next() gets WorkerFailedError."""
        for process, _ in self._made:
            process.kill()
        for process, _ in self._made:
            process.join()
        atexit.unregister(self.end)


def _serve(build: Callable[[int], Any], steps: Sequence[int], writer: Connection, readers: Sequence[Connection]) -> None:
    # A worker that is killed cannot end these, which would hold its memory, ports and the lock of its run, stopped ones for ever.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for reader in readers:
        reader.close()  # so that elsewhere a write fails once the worker is gone
    gc.freeze()  # collections leave the shared pages alone
    torch.set_num_threads(1)  # the threads of OpenMP do not come along in a fork, and it would wait for them
    for step in steps:
        writer.send_bytes(_message(build, step))


def _message(build: Callable[[int], Any], step: int) -> memoryview:
    try:
        return ForkingPickler.dumps(build(step))
    except Exception as fault:
        ours = fault if isinstance(fault, _OURS) else as_disk_error(fault)
        return ForkingPickler.dumps(ours or WorkerFailedError(traceback.format_exc().rstrip()))
