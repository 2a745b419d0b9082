"""The one worker of cluster.launcher=local, and what happens when it hangs.

The command line owns its process: it works in the calling thread, and ends the process when that thread hangs, since nothing
gentler ends a thread that is stuck in a library. A call from Python must not end your process: it works in a thread of its own,
and leaves that thread behind when it hangs. The thread then keeps its memory and its place in the process group, so start a new
process (restart the kernel) before you train again.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec_dist.errors import StopRequested
from rec_dist.launch.watchdog import Cluster, Supervisor, Timeouts
from rec_dist.runtime.heartbeat import Beat, begin_attempt
from rec_dist.runtime.messages import say
from rec_dist.runtime.quiet import flush_denormals
from rec_dist.runtime.repeating import repeating
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.stacks import write_own_stacks

_EXIT_FAILED, _EXIT_STOPPED = 1, 75
_POLL_SECONDS = 0.2
_LEAVE_SECONDS = 5.0  # for a thread that was interrupted, to leave its process group

Work = Callable[[], dict[str, Any]]


def supervisor(run: RunDirectory, timeouts: Timeouts, every_steps: int) -> Supervisor:
    """Watches the one worker of this process; in place of killing it, writes the stacks of all threads."""

    def write_stacks(_: Sequence[Beat], stacks: Path | None) -> list[str]:
        if stacks is not None:
            write_own_stacks(stacks / "rank-0.txt")
        return []

    here = Cluster(end=write_stacks, leaving=lambda nodes: [], without=lambda leaving: False, more=lambda: 0)
    return Supervisor(run, timeouts, here, every_steps=every_steps)


def work_here(work: Work, watch: Supervisor | None) -> dict[str, Any]:
    """What `work` returns. Ends this process when the work hangs, or does not save in time after a stop."""
    if watch is None:
        return work()
    with _ending_process(watch):
        return work()


@contextmanager
def _ending_process(watch: Supervisor) -> Iterator[None]:
    def follow() -> None:
        watch.tick()
        if watch.fault is not None:
            stopped = isinstance(watch.fault, StopRequested)
            say(str(watch.fault) if stopped else f"failed: {watch.fault}", sys.stderr)
            os._exit(_EXIT_STOPPED if stopped else _EXIT_FAILED)

    with repeating(follow, _POLL_SECONDS, name="supervisor"):
        yield


def work_in_thread(work: Work, watch: Supervisor | None, run: RunDirectory) -> dict[str, Any]:
    """What `work` returns, or raises; raises the fault of `watch` and leaves the thread behind when the work hangs."""
    results: list[dict[str, Any]] = []
    faults: list[BaseException] = []

    def target() -> None:
        flush_denormals()
        try:
            results.append(work())
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=target, name="rec-dist-worker", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            if watch is not None:
                watch.tick()
                if watch.fault is not None and thread.is_alive():
                    raise watch.fault
    finally:
        if thread.is_alive():  # interrupted, or hung
            begin_attempt(run.attempt)  # so that the thread ends at its next sign of life, and writes nothing more
            thread.join(_LEAVE_SECONDS)
    if faults:
        raise faults[0]
    return results[0]
