"""Restarts after a worker has failed: what is restarted, how often, and when to stop. Does not depend on Ray.

A lost worker or node costs the steps since the newest checkpoint. A bug costs one repeat: two failures at one step end the run.
"""

from collections.abc import Callable
from typing import Any

from rec_dist.errors import DiskError, NotFiniteError, OutOfMemoryError, StopRequested, UserError, WorkerFailedError
from rec_dist.runtime.run_directory import RunDirectory

FINAL = (UserError, OutOfMemoryError, NotFiniteError, DiskError)  # another attempt would end the same way
# What the other ranks raise when a peer is gone; it is not the cause.
_ECHOES = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "DistBackendError", "Socket Timeout")

_REASON = 200  # characters of a reason; Ray explains at length what may have killed a process


class Paused(Exception):  # noqa: N818 - an agreement, no error
    """The attempt has saved and ended because the cluster has changed. Another follows at once."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class HeadLostError(WorkerFailedError):
    """The cluster is gone, so another attempt has nowhere to run."""


class NeverStartedError(WorkerFailedError):
    """No worker began. What holds them up would hold up another attempt."""


class NotPlacedError(RuntimeError):
    """The cluster looked large enough but did not take the workers. No step is at fault."""


def with_restarts(attempt: Callable[[], dict[str, Any]], run: RunDirectory, *, limit: int) -> dict[str, Any]:
    """Calls attempt(), and again after a failure, at most `limit` times. Each attempt starts from the newest checkpoint.

    Raises what you can act on (FINAL) and a granted stop unchanged, and anything else as WorkerFailedError with one worker's
    traceback. After a failure during a requested stop, raises StopRequested in place of another attempt.
    """
    failed_at: list[tuple[int, int] | None] = []
    while True:
        run.clear_progress()
        try:
            return attempt()
        except (*FINAL, StopRequested, HeadLostError, NeverStartedError):
            raise
        except Paused as pause:
            run.append({"event": "resize", "step": pause.step})
            continue
        except Exception as fault:
            placed = not isinstance(fault, NotPlacedError)
            step, text = _last_step(run), cause_of(fault)
            where = (step, 0 if step else _last_checkpoint(run))
        place = f"after step {step}" if step else "before the first step"
        reason = text.splitlines()[-1][:_REASON]
        if run.stop_wanted(-1) and limit:
            run.log(f"WARNING: a worker failed {place} ({reason}) while the run was stopping")
            raise StopRequested("stopped; a worker failed meanwhile, so run the same command to go on from the newest checkpoint")
        if placed and where in failed_at:
            raise WorkerFailedError(f"a worker failed {place}, as in an earlier attempt, so no other is made:\n{text}")
        if len(failed_at) == limit:
            tried = f" after {limit} restart(s) (cluster.max_restarts)" if limit else ""
            raise WorkerFailedError(f"a worker failed {place}{tried}:\n{text}")
        failed_at.append(where if placed else None)
        run.append({"event": "restart", "step": step, "restart": len(failed_at), "reason": reason})
        run.log(f"WARNING: a worker failed {place} ({reason}); restart {len(failed_at)} of {limit} from the newest checkpoint")


def cause_of(fault: Exception) -> str:
    """The traceback of the worker that failed first, as text, never empty. Ray's worker_failures holds one exception a rank."""
    failures = [str(failure).strip() for failure in getattr(fault, "worker_failures", {}).values()]
    own = [text for text in failures if not any(echo in text.rpartition("\n")[2] for echo in _ECHOES)]
    return next((text for text in [*own, *failures, str(fault).strip()] if text), repr(fault))


def _last_step(run: RunDirectory) -> int:
    """The last step that this attempt finished; 0 for none."""
    state = run.read_progress()
    return int(state["done"]) if state is not None and state["phase"] == "train" else 0


def _last_checkpoint(run: RunDirectory) -> int:
    """The step of the newest checkpoint.

    Two failures before a first step are different when a new checkpoint lies between them.
    """
    return max((int(row["step"]) for row in run.rows() if row.get("event") == "checkpoint"), default=0)
