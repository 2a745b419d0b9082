"""Saves and restores the checkpoints of a run: all ranks write, rank 0 commits, and all ranks agree on the outcome.

Why not use the libraries: the return of Ray's report() is no commit, a torn snapshot file of Ray blocks every restart, and Ray
never falls back to an older one; DeepSpeed writes `latest` before its last barrier. Here, loading takes the newest valid
checkpoint and warns about each damaged one that it skips. If any rank meets a disk fault, all ranks learn of it: the partial
folder is removed, the last good checkpoint stays, and the run stops or continues.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rec_dist.checkpoint import files as checkpoint
from rec_dist.checkpoint.files import CheckpointMetadata, Manifest, SavedCheckpoint
from rec_dist.checkpoint.state_files import StateWriter
from rec_dist.errors import DiskError, UserError
from rec_dist.runtime import collectives
from rec_dist.runtime.world import World
from rec_dist.storage.checksums import FileEntry
from rec_dist.storage.disk import writing
from rec_dist.storage.files import fresh_folder

_NOTED_SECONDS = 1.0  # warn if a save waits longer than this for the previous checkpoint


class Checkpointable(Protocol):
    """The part of an engine (engine/engine.py) that the manager uses, so that checkpoints do not depend on DeepSpeed."""

    def save_state(self, folder: Path, *, asynchronous: bool) -> StateWriter: ...
    def load_state(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints stay, and how they are written."""

    keep: int  # how many of the newest stay
    best: bool  # the one with the lowest validation loss stays too
    asynchronous: bool  # training continues while a checkpoint is written
    stop_on_fault: bool  # a disk fault ends the run


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    partial: Path
    writer: StateWriter
    epoch: int
    valid_loss: float | None
    began: float
    stall_seconds: float


class CheckpointManager:
    """The checkpoints of one run. All ranks must call every method together, except `committed`.

    log: takes lines. record: takes rows of metrics.jsonl. before_commit: syncs both files. All three are called on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        metadata: CheckpointMetadata,
        retention: RetentionPolicy,
        *,
        zero_stage: int,
        log: Callable[[str], None],
        record: Callable[[dict[str, Any]], None],
        before_commit: Callable[[], None],
    ) -> None:
        self._folder, self._world, self._metadata, self._retention = folder, world, metadata, retention
        self._zero_stage, self._log, self._record, self._before_commit = zero_stage, log, record, before_commit
        self._pending: _Pending | None = None

    def committed(self) -> list[int]:
        """The steps of all folders that are named as checkpoints, oldest first. Does not look into the folders."""
        return checkpoint.committed(self._folder)

    def _at(self, step: int) -> Path:
        return checkpoint.folder_of(self._folder, step)

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._pending is not None and not self._pending.writer.done

    def save(self, engine: Checkpointable, step: int, *, epoch: int, valid_loss: float | None = None) -> None:
        """Writes the state after `step` steps. If asynchronous, starts to write it, and a later settle() commits it.

        Raises DiskError on every rank for a disk fault that ends the run.
        """
        began = time.perf_counter()
        before = self._pending
        self.settle()
        waited = time.perf_counter() - began
        if before is not None and waited > _NOTED_SECONDS and self._world.is_main:
            self._log(
                f"WARNING: step {step} waited {waited:.1f} s for the checkpoint of step {before.step} to be written; raise "
                "checkpoint.every_steps or use a faster disk"
            )
        partial = self._at(step).with_name(self._at(step).name + ".tmp")
        fault = collectives.share_from_main(self._attempt(lambda: fresh_folder(partial)) if self._world.is_main else None)
        if fault is not None:
            self._failed(step, partial, fault)
            return
        writer = engine.save_state(partial, asynchronous=self._retention.asynchronous)
        stall = time.perf_counter() - began
        self._pending = _Pending(step, partial, writer, epoch, valid_loss, began, stall)
        if not self._retention.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Waits for the checkpoint that is being written, if any, and commits it. Raises DiskError as save() does."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        parts = collectives.gather(pending.writer.finish())
        fault = next((part.fault for part in parts if part.fault is not None), None)
        files = sorted((entry for part in parts for entry in part.files), key=lambda entry: entry.name)
        if self._world.is_main and fault is None:
            fault = self._attempt(lambda: self._commit(pending, files))
        fault = collectives.share_from_main(fault)
        if fault is not None:
            self._failed(pending.step, pending.partial, fault)
        elif self._world.is_main:
            row = {"event": "checkpoint", "step": pending.step, "seconds": pending.stall_seconds}
            row |= {"write_seconds": time.perf_counter() - pending.began, "bytes": sum(entry.bytes for entry in files)}
            best = self._best_step()
            self._record(row | ({} if best is None else {"best": best}))

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """On rank 0: runs `action` and returns a disk fault as one line, or None."""
        try:
            with writing(self._folder):
                action()
        except DiskError as fault:
            return str(fault)
        return None

    def _failed(self, step: int, partial: Path, fault: str) -> None:
        last = collectives.share_from_main(self.committed()[-1:])
        kept = f"the last good one is {self._at(last[0]).name}" if last else "there is no earlier one"
        line = f"the checkpoint of step {step} could not be written: {fault}; {kept}"
        unreported = None
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            unreported = self._attempt(lambda: self._report(step, line))
        if self._retention.stop_on_fault or collectives.share_from_main(unreported) is not None:
            raise DiskError(line)

    def _report(self, step: int, line: str) -> None:
        self._log(f"WARNING: {line}")
        self._record({"event": "checkpoint_failed", "step": step, "reason": line})

    def _commit(self, pending: _Pending, files: list[FileEntry]) -> None:
        final = self._at(pending.step)
        metadata = self._metadata
        manifest = Manifest(
            step=pending.step,
            world_size=self._world.size,
            zero_stage=self._zero_stage,
            base=metadata.base,
            config=metadata.config,
            sampler={**metadata.sampler, "step": pending.step, "epoch": pending.epoch},
            valid_loss=pending.valid_loss,
            versions=metadata.versions,
            files=files,
        )
        self._before_commit()
        checkpoint.commit(pending.partial, final, manifest)
        kept = [known for known in self.committed() if known <= pending.step]
        for old in set(kept[: -self._retention.keep]) - {self._best_step()}:
            shutil.rmtree(self._at(old), ignore_errors=True)

    def _best_step(self) -> int | None:
        best = checkpoint.best(self._folder) if self._retention.best else None
        return None if best is None else best.step

    def restore(self, engine: Checkpointable) -> int:
        """Loads the newest valid checkpoint into `engine` and returns its step, or 0 when there is none.

        Raises UserError on every rank if it belongs to another base model or configuration.
        """
        saved, fault = collectives.share_from_main(self._choose() if self._world.is_main else None)
        if fault is not None:
            raise UserError(fault)
        if saved is None:
            return 0
        engine.load_state(saved.folder)
        return int(saved.step)

    def load_best(self, engine: Checkpointable) -> SavedCheckpoint | None:
        """Loads the checkpoint with the lowest validation loss. Returns None and changes nothing if there is none."""
        saved = collectives.share_from_main(self._best_valid() if self._world.is_main else None)
        if saved is not None:
            engine.load_state(saved.folder)
        return saved  # type: ignore[no-any-return]

    def _choose(self) -> tuple[SavedCheckpoint | None, str | None]:
        """On rank 0: the checkpoint to load, and the reason if it must not be loaded."""
        for partial in self._folder.glob("step-*.tmp"):  # from an attempt that was cut short
            shutil.rmtree(partial, ignore_errors=True)
        if (saved := self._newest_valid()) is None:
            return None, None
        if saved.base != self._metadata.base:
            return saved, (
                f"{saved.folder} belongs to a base model of fingerprint {saved.base}, and model.path holds one of "
                f"{self._metadata.base}; put the model back or choose another train.run_dir"
            )
        sampler = {key: saved.sampler.get(key) for key in self._metadata.sampler}
        if sampler != self._metadata.sampler or saved.config != self._metadata.config:
            return saved, (
                f"{saved.folder} belongs to another configuration (fingerprint {saved.config}, sampler {sampler}) than this run "
                f"({self._metadata.config}, {self._metadata.sampler}); remove it or choose another train.run_dir"
            )
        there, here = (saved.world_size, saved.zero_stage), (self._world.size, self._zero_stage)
        if there != here:
            self._log(f"{saved.folder.name}: from {there[0]} worker(s) at ZeRO stage {there[1]} to {here[0]} at stage {here[1]}")
        return saved, None

    def _newest_valid(self) -> SavedCheckpoint | None:
        valid = (step for step in reversed(self.committed()) if not self._set_aside(self._at(step)))
        return next((checkpoint.read(self._at(step)) for step in valid), None)

    def _best_valid(self) -> SavedCheckpoint | None:
        while (saved := checkpoint.best(self._folder)) is not None:
            if not self._set_aside(saved.folder):
                return saved
        return None

    def _set_aside(self, folder: Path) -> bool:
        """Renames the folder of a damaged checkpoint, for inspection, and logs a warning. Returns whether it was damaged."""
        problems = checkpoint.verify(folder)
        if problems:
            self._log(f"WARNING: checkpoint passed over: {'; '.join(problems)}")
            bad = folder.with_name(folder.name + ".bad")
            shutil.rmtree(bad, ignore_errors=True)
            folder.rename(bad)
        return bool(problems)
