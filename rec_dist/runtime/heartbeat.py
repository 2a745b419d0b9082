"""Heartbeats of workers: one small file a rank in the run directory, which the rank rewrites whenever it makes progress.

From outside, a worker that waits for a dead peer looks like one that works. Only progress tells them apart. So a beat is an event
(a batch taken, a micro-batch done, a checkpoint begun), never a timer. Cost: at most 2 small files a second and rank.
"""

import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World

_SECONDS = 0.5  # between two writes of one phase
STACK_SIGNAL = signal.SIGUSR1


class SupersededError(RuntimeError):
    """Another attempt has taken over the run directory. This worker's driver is gone, and this worker must write nothing more."""


@dataclass(frozen=True)
class Beat:
    """Where a rank last made progress. node: the launcher's name of its machine; born: when its process began, in clock ticks."""

    rank: int
    pid: int
    node: str
    born: int
    phase: str
    step: int
    count: int


class Heartbeat:
    """The heartbeat of one worker. folder: that of the run's attempt; node: the launcher's name of this machine."""

    def __init__(self, folder: Path, rank: int, node: str) -> None:
        self._folder, self._rank, self._node = folder, rank, node
        self._attempt = read_attempt(folder)
        self._phase, self._step, self._count, self._written = "", 0, 0, 0.0
        self._born = born(os.getpid()) or 0
        folder.mkdir(parents=True, exist_ok=True)
        # Stays open, so that a signal at any moment finds a file for the stacks of all threads.
        self._stacks = stack_path(folder, rank).open("w", encoding="utf-8")
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Notes progress, in a new phase or step or in the same one.

        Raises SupersededError when another attempt has taken over.
        """
        self._count += 1
        now = time.monotonic()
        phase, step = self._phase if phase is None else phase, self._step if step is None else step
        if phase == self._phase and now - self._written < _SECONDS:
            self._step = step
            return
        if read_attempt(self._folder) != self._attempt:
            raise SupersededError(f"another attempt has taken over {self._folder.parent}; this worker ends")
        self._phase, self._step, self._written = phase, step, now
        beat = Beat(self._rank, os.getpid(), self._node, self._born, phase, step, self._count)
        temporary = self._folder / f".rank-{self._rank}.tmp"
        temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
        temporary.replace(self._folder / f"rank-{self._rank}.json")

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.unregister(STACK_SIGNAL)
        self._stacks.close()


@contextmanager
def reporting(run: RunDirectory, world: World, phase: str) -> Iterator[Callable[[int, int], None]]:
    """Gives what every rank calls with what is done, and of how much: a sign of life of each, and the run's progress on rank 0.

    The driver of a command that only scores ends it when neither changes for cluster.hang_seconds. Ranks do not wait for one
    another there, so rank 0 may have ended long before the last.
    """
    with Heartbeat(run.attempt, world.rank, world.node) as heart:

        def report(done: int, total: int) -> None:
            heart.beat(phase)
            if world.is_main:
                run.progress(phase, done, total)

        yield report


def stack_path(folder: Path, rank: int) -> Path:
    """The file that a worker writes its stacks to when it gets STACK_SIGNAL."""
    return folder / f"rank-{rank}.stack"


def begin_attempt(folder: Path) -> None:
    """Removes the beats and the pause of an earlier attempt. A worker of it that is still alive ends at its next beat."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".attempt.tmp"
    temporary.write_text(f"{os.getpid()}-{time.time_ns()}", encoding="utf-8")
    temporary.replace(folder / ".attempt")
    for path in (*folder.glob("rank-*"), folder / "pause"):
        path.unlink(missing_ok=True)


def request_pause(folder: Path, step: int) -> None:
    """Asks the workers to save and end after `step`, or as soon after it as they can. The driver then starts others."""
    temporary = folder / ".pause.tmp"
    temporary.write_text(str(step), encoding="utf-8")
    temporary.replace(folder / "pause")


def pause_wanted(folder: Path, step: int) -> bool:
    """Whether this attempt should end after `step`."""
    try:
        return step >= int((folder / "pause").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def read_attempt(folder: Path) -> str:
    """The name of the attempt that the folder belongs to; empty before the first."""
    try:
        return (folder / ".attempt").read_text(encoding="utf-8")
    except OSError:
        return ""


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of each rank that has begun, in the order of ranks."""
    return sorted(_beats(folder), key=lambda beat: beat.rank)


def _beats(folder: Path) -> Iterator[Beat]:
    for path in folder.glob("rank-*.json"):
        try:
            yield Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # removed since it was listed, or cut off by a full disk
            continue


def born(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; with the pid it names one process.

    None without such a process or /proc.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
