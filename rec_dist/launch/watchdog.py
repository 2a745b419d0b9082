"""What the driver watches while workers run: that they make progress, that they stop in time, and that nodes leave or come back.

It reads the run directory and does not depend on Ray: the caller passes in what it needs of the cluster. Cost: reading a few
small files a second.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rec_dist.errors import StopRequested, WorkerFailedError
from rec_dist.launch.restart import NeverStartedError
from rec_dist.runtime.heartbeat import Beat, read_beats, request_pause
from rec_dist.runtime.run_directory import RunDirectory

_TICK_SECONDS, _NODES_SECONDS = 0.5, 3.0
_LOOKS, _SLOWEST_SECONDS = 50, 10.0  # reads of all ranks' beats in cluster.hang_seconds, and the longest time between two
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timeouts:
    """hang_seconds:

    the longest time without progress, 0 for no limit; grace_seconds: from the request to stop to its checkpoint.
    """

    hang_seconds: float
    grace_seconds: float


class ProgressWatchdog:
    """How long no rank has made progress, by this process's clock alone, so that the clocks of machines need not agree."""

    def __init__(self, folder: Path, clock: Clock = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._last: list[Beat] = []
        self._since = clock()

    def look(self) -> tuple[float, list[Beat]]:
        """(seconds since the last change, or since this object was made if there was none yet; where each rank is)."""
        beats = read_beats(self._folder)
        if beats != self._last:
            self._last, self._since = beats, self._clock()
        return self._clock() - self._since, beats


@dataclass(frozen=True)
class Cluster:
    """What a supervisor may ask of the cluster, and do to it.

    end: kills the processes of these beats, writes their stacks into the folder unless it is None, and returns a line for each.
    leaving: which of these machines are about to be taken away. without: whether the run can go on without these machines.
    more: how many workers would fit now beyond those that run.
    """

    end: Callable[[Sequence[Beat], Path | None], list[str]]
    leaving: Callable[[set[str]], list[str]]
    without: Callable[[list[str]], bool]
    more: Callable[[], int]


class Supervisor:
    """Watches one attempt. Call tick() several times a second.

    fault: why the supervisor ended the attempt, for the caller to raise; pausing: the workers have been asked to end at a
    checkpoint.
    """

    def __init__(
        self, run: RunDirectory, timeouts: Timeouts, cluster: Cluster, *, every_steps: int, clock: Clock = time.monotonic
    ) -> None:
        self._run, self._timeouts, self._cluster, self._every, self._clock = run, timeouts, cluster, every_steps, clock
        self._still = ProgressWatchdog(run.attempt, clock)
        self._look_seconds = min(max(timeouts.hang_seconds / _LOOKS, _TICK_SECONDS), _SLOWEST_SECONDS)
        self._ticked = self._looked = self._asked = clock()
        self._stop_since: float | None = None
        self.pausing = False
        self.fault: Exception | None = None

    def tick(self) -> None:
        """Checks everything that is due, and acts on it."""
        now = self._clock()
        if self.fault is not None or now - self._ticked < _TICK_SECONDS:
            return
        self._ticked = now
        if self._stop_is_late(now):
            self._cut_short()
            return
        if now - self._looked >= self._look_seconds:
            self._looked = now
            quiet, beats = self._still.look()
            if self._timeouts.hang_seconds and quiet > self._timeouts.hang_seconds:
                self._hung(quiet, beats)
                return
        if now - self._asked > _NODES_SECONDS and not self.pausing and self._stop_since is None:
            self._asked = now
            self._mind_nodes(read_beats(self._run.attempt))

    def _hung(self, quiet: float, beats: list[Beat]) -> None:
        if not beats:  # no process is known that could be killed, so another attempt would meet the ones that hang
            self.fault = NeverStartedError(
                f"hang: no worker gave a sign of life for {quiet:.0f} s (cluster.hang_seconds {self._timeouts.hang_seconds:g}): "
                "the workers did not start, or their imports hang, as on a file system that does not answer"
            )
            return
        lines = self._cluster.end(beats, self._run.stacks)
        for line in lines:
            self._run.log(f"WARNING: {line}")
        stacks = ", ".join(f"rank-{beat.rank}.txt" for beat in beats[:4]) + (", ..." if len(beats) > 4 else "")
        self.fault = WorkerFailedError(
            f"hang: no worker made progress for {quiet:.0f} s (cluster.hang_seconds {self._timeouts.hang_seconds:g}); stacks in "
            f"{self._run.stacks}: {stacks}"
        )

    def _stop_is_late(self, now: float) -> bool:
        if self._stop_since is None and self._run.stop_wanted(-1):
            self._stop_since = now
        return self._stop_since is not None and now - self._stop_since > self._timeouts.grace_seconds

    def _cut_short(self) -> None:
        self._cluster.end(read_beats(self._run.attempt), None)
        self.fault = StopRequested(
            f"stopped without a new checkpoint: none was saved in {self._timeouts.grace_seconds:g} s (checkpoint.grace_seconds); "
            "run the same command to go on from the newest one"
        )

    def _mind_nodes(self, beats: list[Beat]) -> None:
        """Ends the attempt now when a machine is about to be taken away, and at the next checkpoint when one has come back."""
        if not beats:
            return
        leaving = self._cluster.leaving({beat.node for beat in beats})
        step = max(beat.step for beat in beats)
        if leaving and self._cluster.without(leaving):
            self.pausing = True
            self._run.log(
                f"WARNING: {len(leaving)} node(s) are being taken away; saving a checkpoint, then going on without them"
            )
            request_pause(self._run.attempt, 0)
        elif leaving:
            self._run.log(f"WARNING: {len(leaving)} node(s) are being taken away; saving a checkpoint, then stopping")
            self._run.request_stop()
        elif (more := self._cluster.more()) > 0:
            self.pausing = True
            place = -(-max(step, 1) // self._every) * self._every
            self._run.log(f"room for {more} more worker(s); starting again with them after the checkpoint of step {place}")
            request_pause(self._run.attempt, place)
