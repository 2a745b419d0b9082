"""The run directory: the one place for a run's configuration, numbers and messages, through which others follow the run.

config.yaml and config.json (the same), environment.json, metrics.jsonl (append only), evaluation.json, log.txt, progress.json,
stop (a request), finished.json (written last), checkpoints/, reference/, reference-valid/, model/, predictions.arrow.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec_dist.errors import UserError
from rec_dist.runtime.identity import differences
from rec_dist.runtime.messages import visible
from rec_dist.runtime.rows import OF_A_STEP, are_numbers, lines_after, read_rows
from rec_dist.storage.disk import writing
from rec_dist.storage.files import (
    Access,
    append_line,
    is_left_over,
    lock,
    make_folder,
    misplaced,
    read_object,
    remove_left_over,
    sync,
    write_json,
    write_text,
)

_FILES = ("config.yaml", "environment.json", "inputs.json", "metrics.jsonl", "log.txt", "progress.json", "stop", "finished.json")
_FOLDERS = ("checkpoints", "reference", "reference-valid", "model", "attempt", "stacks")


class RunDirectory:
    """Paths and small files of one run. Only rank 0 and the driver write. key: the configuration key that holds `path`."""

    def __init__(self, path: Path, *, key: str = "train.run_dir") -> None:
        self.path, self._key = path, key
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.reference = path / "reference"
        self.valid_reference = path / "reference-valid"
        self.model = path / "model"
        self.evaluation = path / "evaluation.json"
        self._log_path = path / "log.txt"
        self._progress_path = path / "progress.json"
        self._stop_path = path / "stop"
        self.attempt, self.stacks = path / "attempt", path / "stacks"  # the workers' heartbeats; the stacks of hung workers
        self._finished_path = path / "finished.json"

    def claim(self, config: Mapping[str, Any], text: str) -> None:
        """Claims the directory for this configuration, or checks that it belongs to it. text: the configuration as YAML, to keep.

        Raises UserError when the directory holds a run of another configuration, or other files.
        """
        saved = self.path / "config.json"
        old = value = json.loads(json.dumps(config))
        if odd := misplaced(self.path, files=_FILES, folders=_FOLDERS):
            raise UserError(f"{odd}; remove it, or choose another {self._key}")
        if saved.is_file():
            old = self.config()
            if changed := differences(old, value):
                longer = self._finished_path.is_file() and set(changed) <= {"train.max_steps", "train.epochs"}
                on = f"; to train on from its model, set train.init_from={self.path} with another train.run_dir" if longer else ""
                raise UserError(
                    f"{self._key} ({self.path}) holds a run of another configuration (different: {', '.join(changed[:6])}); "
                    f"choose another {self._key}, or remove that folder{on}"
                )
        else:
            self._refuse_others()
        moved = old.get("train", {}).get("run_dir") != value.get("train", {}).get("run_dir")
        if moved or not saved.is_file():
            write_json(saved, config)
        if moved or not self.config_path.is_file():
            write_text(self.config_path, text)

    def config(self) -> dict[str, Any]:
        """The configuration that the directory was claimed for. Raises UserError if it is missing or damaged."""
        return read_object(self.path / "config.json", f"choose another {self._key}, or remove that folder")

    @contextmanager
    def claimed(self, config: Mapping[str, Any], text: str) -> Iterator[None]:
        """Locks and claims the directory. A UserError inside, before the first checkpoint, removes a directory that this call
        made.

        So an error that only workers can find (a cluster that is too small, an adapter that does not fit) leaves nothing to
        remove.
        """
        try:
            new = not (self.path / "config.json").is_file()
        except OSError as fault:  # a name that is too long
            raise self._unusable(fault) from fault
        if new:
            self._refuse_others()
        with self.locked(config.get("train", {}).get("access", "owner")):
            for folder in (self.path, self.checkpoints):
                remove_left_over(folder)
            self.claim(config, text)
            try:
                yield
            except UserError:
                if new and not any(self.checkpoints.glob("step-*")):
                    self.take_back()
                raise

    def _refuse_others(self) -> None:
        try:
            others = self.path.is_dir() and any(
                entry.name != ".lock" and not is_left_over(entry) for entry in self.path.iterdir()
            )
        except (OSError, ValueError) as fault:
            raise self._unusable(fault) from fault
        if others:
            raise UserError(f"{self._key} ({self.path}) is not empty and holds no run; choose another folder")

    @contextmanager
    def locked(self, access: Access = "owner") -> Iterator[None]:
        """Holds the directory for this process. Raises UserError when another process holds it. access: if this makes it."""
        try:
            make_folder(self.path, access)
            held = lock(self.path / ".lock", seconds=0.5)  # `status` holds it for a moment, to see whether somebody does
        except BlockingIOError as fault:
            raise UserError(f"{self._key} ({self.path}) is in use by another process; wait for it or choose another") from fault
        except (OSError, ValueError) as fault:
            raise self._unusable(fault) from fault
        try:
            yield
        finally:
            os.close(held)

    def take_back(self) -> None:
        """Removes everything that a refused run made here. Keeps a link and the folder that it points to."""
        linked = self.path.is_symlink()  # the link and its folder belong to the user
        for entry in [*self.path.iterdir()] if linked else [self.path]:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _unusable(self, fault: Exception) -> UserError:
        why = getattr(fault, "strerror", None) or fault  # without the path, which may be long
        return UserError(f"{self._key} ({str(self.path)[:200]}) cannot be a run directory: {why}; choose another folder")

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends one object to metrics.jsonl, whole or not at all. A kill may cut off the last line. Raises DiskError."""
        append_line(self.metrics_path, json.dumps(row, allow_nan=False))

    def sync_numbers(self) -> None:
        """Puts the rows and lines so far on the disk: before a checkpoint, which a restart continues from, and before the end."""
        for path in (self.metrics_path, self._log_path):
            if path.is_file():
                sync(path)

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows of metrics.jsonl, without damaged ones."""
        return read_rows(self.metrics_path)

    def drop_steps_after(self, step: int) -> int:
        """Removes the rows of steps after `step`, which a restart repeats. Returns the number of these steps."""
        rows = self.rows()
        late = [row["step"] for row in rows if row.get("event") in OF_A_STEP and row["step"] > step]
        kept = [row for row in rows if not (row.get("event") in OF_A_STEP and row["step"] > step)]
        if self.metrics_path.is_file():
            write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
        return max(late, default=step) - step

    def log(self, line: str) -> None:
        """Appends a line to log.txt, which the driver shows, with control characters made visible. Raises DiskError."""
        append_line(self._log_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {visible(line)}")

    def log_size(self) -> int:
        """Bytes of log.txt so far."""
        return self._log_path.stat().st_size if self._log_path.is_file() else 0

    def log_after(self, position: int) -> tuple[list[str], int]:
        """(whole lines of log.txt from byte `position` on, the next position)."""
        return lines_after(self._log_path, position)

    def progress(self, phase: str, done: int, total: int, note: str = "", seconds_left: float | None = None) -> None:
        """Writes where the run stands: `done` of `total` in `phase`, and the seconds that are left of this phase."""
        temporary = self._progress_path.with_suffix(".tmp")
        value = {"phase": phase, "done": done, "total": total, "note": note, "seconds_left": seconds_left}
        with writing(self._progress_path):
            temporary.write_text(json.dumps(value), encoding="utf-8")
            temporary.replace(self._progress_path)

    def read_progress(self) -> dict[str, Any] | None:
        """What `progress` wrote last; None when there is nothing, or it is damaged."""
        try:
            value = dict(json.loads(self._progress_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        left = value.get("seconds_left")
        whole = are_numbers(value.get("done"), value.get("total"), 0 if left is None else left)
        return value if whole and isinstance(value.get("phase"), str) else None

    def request_stop(self) -> None:
        """Asks the run to save and stop after its current step."""
        make_folder(self.path, "owner")
        self._stop_path.write_text("", encoding="utf-8")

    def clear_stop(self) -> None:
        """Removes a request to stop that has been granted."""
        self._stop_path.unlink(missing_ok=True)

    def drop_stale_stop(self) -> None:
        """Removes a request that a killed attempt left behind. Keeps one that names a step, which somebody wrote by hand."""
        if self._stop_path.is_file() and not self._stop_path.read_text(encoding="utf-8").strip():
            self._stop_path.unlink()

    def stop_wanted(self, step: int) -> bool:
        """Whether the run should stop: the file `stop` exists, and is empty or holds a step that the run has reached."""
        try:
            text = self._stop_path.read_text(encoding="utf-8").strip()
        except OSError:
            return False
        return not text.isdigit() or step >= int(text)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes what rank 0 returned, for a driver that may run on another machine."""
        write_json(self.path / ".result.json", result)

    def take_result(self) -> dict[str, Any]:
        """Reads what rank 0 wrote, and removes it."""
        path = self.path / ".result.json"
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        return value

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the run as finished. The last file that a run writes: whatever else it names is on the disk."""
        self.sync_numbers()
        write_json(self._finished_path, summary)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None. Raises UserError when it is damaged."""
        if not self._finished_path.is_file():
            return None
        way_out = "remove that file and run `rec-dist train` again, which ends where the run ended"
        value = read_object(self._finished_path, way_out)
        if type(value.get("step")) is not int:
            raise UserError(f"{self._finished_path} is damaged (it names no step); {way_out}")
        return value

    def clear_progress(self) -> None:
        """Removes the progress of an earlier attempt."""
        self._progress_path.unlink(missing_ok=True)
