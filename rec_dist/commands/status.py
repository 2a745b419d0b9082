"""`rec-dist status`: where a run stands, from the files of its run directory or of their copy, on whatever machine it runs."""

import fcntl
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.checkpoint.files import committed_steps, folder_of
from rec_dist.checkpoint.remote_files import OWNER
from rec_dist.errors import DiskError, StopRequested, UserError
from rec_dist.runtime.duration import duration
from rec_dist.runtime.messages import visible
from rec_dist.runtime.rows import are_numbers, num_restarts
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.location import Location, NoSuchFileError
from rec_dist.storage.uri import is_remote

_READ = {"config.yaml", "config.json", "metrics.jsonl", "progress.json", "finished.json", "log.txt", "evaluation.json", OWNER}
_COPIED = "not finished when it was copied"


@dataclass(frozen=True)
class Status:
    """Where a run stands. Times are in seconds. seen: since anything was last written. goodput: the share of the time since the
    first start that went into steps that still count; the rest was lost, spent waiting, or spent on steps that were
    repeated."""

    state: str
    phase: str
    done: int
    total: int
    seen: float
    eta: float | None
    goodput: float | None
    restarts: int
    checkpoint: int | None
    error: str | None


def status_of(path: Path, *, now: float | None = None) -> Status:
    """Reads a run directory, or a copy of one, which does not show whether the run goes on. now: seconds since 1970, for the
    ages.

    Raises UserError when `path` is no run directory.
    """
    run = RunDirectory(path)
    try:
        found = run.config_path.is_file()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise UserError(f"{str(path)[:200]} is no run directory (config.yaml is missing); give the train.run_dir of a run")
    rows, finished = run.rows(), run.finished()
    steps = [row for row in rows if row.get("event") in ("step", "bad_step")]
    timed = [float(row["step_seconds"]) for row in steps if "step_seconds" in row]
    progress = run.read_progress() or {"phase": "train", "done": 0, "total": 0}
    if finished is not None:
        progress = {"phase": "train", "done": finished["step"], "total": finished["step"]}
    last_seen = max(file.stat().st_mtime for file in path.iterdir() if file.is_file() and file.name != ".lock")
    rests = _COPIED if (path / OWNER).is_file() else _ended(rows)
    state = "finished" if finished is not None else "running" if _locked(path) else rests
    bad = sum(row["event"] == "bad_step" for row in steps)
    kept_steps = int(steps[-1]["step"]) - bad if steps else 0
    starts = [float(row["time"]) for row in rows if row.get("event") == "start"]
    first = path / "config.json"
    began = starts[0] if starts else first.stat().st_mtime if first.is_file() else None
    until = (now or time.time()) if state == "running" else _ended_at(finished, last_seen)
    lived = until - began if began is not None else 0.0
    return Status(
        state=state,
        phase=progress["phase"],
        done=progress["done"],
        total=progress["total"],
        seen=max((now or time.time()) - last_seen, 0.0),
        eta=progress.get("seconds_left") if state == "running" else None,
        goodput=min(statistics.mean(timed) * kept_steps / lived, 1.0) if timed and lived > 0 else None,
        restarts=num_restarts(rows),
        checkpoint=_newest_checkpoint(run),
        error=_last_error(rows),
    )


def status(target: str) -> list[str]:
    """Lines that say where a run stands. target: its directory, or the URI of its copy."""
    if is_remote(target):
        with tempfile.TemporaryDirectory() as place:
            name = _small_copy(target, Path(place))
            found = status_of(Path(place))
    else:
        name, found = target, status_of(Location(target).folder)
    share = f" ({100 * found.done / found.total:.0f} %)" if found.total else ""
    lines = {
        "run": name,
        "state": f"{found.state}; last sign of life {duration(found.seen)} ago",
        "step" if found.phase == "train" else found.phase: _place(found, share),
        "ETA": duration(found.eta) if found.eta is not None else "-",
        "goodput": f"{100 * found.goodput:.0f} % of the time since the first start" if found.goodput is not None else "-",
        "restarts": str(found.restarts),
        "checkpoint": f"after step {found.checkpoint}" if found.checkpoint is not None else "none",
        "last error": found.error or "none",
    }
    return [f"{name:<11} {' '.join(visible(text).split())}" for name, text in lines.items()]


def _place(found: Status, share: str) -> str:
    if found.state == "finished" and not found.total:
        return "none: the model was fitted at once"
    return f"{found.done} of {found.total or '?'}{share}"


@contextmanager
def noting_failure(run: RunDirectory) -> Iterator[None]:
    """Writes a row that says why the run failed inside, for those who cannot see the driver's output."""
    try:
        yield
    except StopRequested:
        raise
    except Exception as fault:
        reason = [type(fault).__name__, *str(fault).strip().splitlines()][-1][:200]
        with suppress(DiskError, OSError):  # perhaps nothing can be written, and that is the fault
            step = max((row["step"] for row in run.rows() if row.get("event") in ("step", "bad_step")), default=0)
            run.append({"event": "failed", "step": step, "reason": reason})
        raise


def _locked(path: Path) -> bool:
    """Whether a process, here or on another machine of a shared file system, holds the run directory."""
    try:
        handle = os.open(path / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def _ended_at(finished: Mapping[str, Any] | None, last_seen: float) -> float:
    """When the run ended: an evaluation, or whoever copies the files, writes into its directory later."""
    return float(finished["time"]) if finished is not None and are_numbers(finished.get("time")) else last_seen


def _ended(rows: list[dict[str, Any]]) -> str:
    if rows and rows[-1].get("event") == "failed":
        return "failed; the last checkpoint is kept"
    return "not running; run the same command to go on"


def _newest_checkpoint(run: RunDirectory) -> int | None:
    names = [folder.name.removeprefix("step-") for folder in run.checkpoints.glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def _last_error(rows: list[dict[str, Any]]) -> str | None:
    """The newest failure, restart, left-out step or failed checkpoint, in one line."""
    for row in reversed(rows):
        if row.get("event") == "bad_step":
            return f"step {row['step']}: loss or gradient not finite, left out"
        if row.get("event") == "checkpoint_failed":
            return f"no checkpoint after step {row['step']}: {row['reason']}"
        if row.get("event") in ("restart", "failed"):
            return f"after step {row['step']}: {row['reason']}"
    return None


def _small_copy(place: str, folder: Path) -> str:
    """Fetches what shows where a run stands from its copy: small files with their times, and empty folders for checkpoints.

    Returns the place as messages show it. Raises UserError when it cannot be read, or no run is there.
    """
    location = Location(place, key="checkpoint.remote")
    files = location.tree()
    if "config.yaml" not in files:
        what = "cannot be read: its bucket does not exist" if location.lacks_bucket() else "holds no run"
        raise UserError(f"{location} {what}; give the checkpoint.remote of a run")
    for name in _READ & files.keys():
        with suppress(NoSuchFileError):
            location.copy(name, folder / name)
            os.utime(folder / name, (files[name].written, files[name].written))
    for step in committed_steps(files):
        folder_of(folder / "checkpoints", step).mkdir(parents=True)
    return str(location)
