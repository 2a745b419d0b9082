"""Our own catalogue of the checkpoints of a run: written by all ranks, committed by one, agreed on by all.

Why not the libraries': Ray's report() returning is no commit, a torn snapshot file blocks every restart and it never falls back;
DeepSpeed writes `latest` before its last barrier. Loading takes the newest valid one and walks back past bad ones, loudly. A fault of
the disk on any rank is known to all: the partial folder goes, the last good checkpoint stays, and the run stops or goes on.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rec_dist.checkpoint import files as checkpoint
from rec_dist.checkpoint.files import SHARDS, WHOLE, CheckpointMetadata, SavedCheckpoint
from rec_dist.checkpoint.state_files import StateWriter
from rec_dist.errors import DiskError, UserError
from rec_dist.runtime import collectives
from rec_dist.runtime.world import World
from rec_dist.storage.disk import writing

_NOTED_SECONDS = 1.0  # a wait for the checkpoint before that is worth a line


class Checkpointable(Protocol):
    """What the manager needs of an engine (engine/engine.py), so that checkpoints do not depend on DeepSpeed."""

    def save_state(self, folder: Path, *, asynchronous: bool) -> StateWriter: ...
    def load_state(self, folder: Path) -> None: ...
    def load_shards(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class RetentionPolicy:
    """keep: newest that stay; best: the one of lowest validation loss stays too; stop_on_fault: a fault of the disk ends the run."""

    keep: int
    best: bool
    asynchronous: bool
    stop_on_fault: bool


@dataclass(frozen=True)
class _Pending:
    """A checkpoint on its way to the disk."""

    step: int
    partial: Path
    writer: StateWriter
    facts: dict[str, Any]
    began: float
    stall_seconds: float


class CheckpointManager:
    """The checkpoints of one run. Every method but `committed` is a collective: all ranks call it together.

    log: takes lines, record: rows of metrics.jsonl; both called on rank 0.
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
    ) -> None:
        self._folder, self._world, self._metadata, self._retention = folder, world, metadata, retention
        self._zero_stage, self._log, self._record = zero_stage, log, record
        self._pending: _Pending | None = None

    def committed(self) -> list[int]:
        """Steps of the folders that claim to be checkpoints, oldest first; their contents are not looked at."""
        return checkpoint.committed(self._folder)

    def _at(self, step: int) -> Path:
        return checkpoint.folder_of(self._folder, step)

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._pending is not None and not self._pending.writer.done

    def save(self, engine: Checkpointable, step: int, *, epoch: int, valid_loss: float | None = None) -> None:
        """Writes the state after `step` steps; when asynchronous, begins to, and a later settle() commits it.

        DiskError on every rank when the disk is at fault and that ends the run.
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
        fault = collectives.share_from_main(self._attempt(lambda: _fresh(partial)) if self._world.is_main else None)
        if fault is not None:
            self._failed(step, partial, fault)
            return
        writer = engine.save_state(partial, asynchronous=self._retention.asynchronous)
        stall = time.perf_counter() - began
        facts = {"epoch": epoch, "valid_loss": valid_loss}
        self._pending = _Pending(step, partial, writer, facts, began, stall)
        if not self._retention.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Waits for the checkpoint on its way, if any, and commits it. DiskError as in save()."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        parts = collectives.gather(pending.writer.finish())
        fault = next((part.fault for part in parts if part.fault is not None), None)
        files = {name: entry for part in parts for name, entry in part.files.items()}
        if self._world.is_main and fault is None:
            fault = self._attempt(lambda: self._commit(pending, files))
        fault = collectives.share_from_main(fault)
        if fault is not None:
            self._failed(pending.step, pending.partial, fault)
        elif self._world.is_main:
            best = checkpoint.best(self._folder) if self._retention.best else None
            row = {"event": "checkpoint", "step": pending.step, "seconds": pending.stall_seconds}
            row |= {"write_seconds": time.perf_counter() - pending.began, "bytes": sum(size for size, _ in files.values())}
            self._record(row | ({} if best is None else {"best": best.step}))

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """On rank 0: what the disk has against it, as one line."""
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
        untold = None
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            untold = self._attempt(lambda: self._tell(step, line))
        if self._retention.stop_on_fault or collectives.share_from_main(untold) is not None:
            raise DiskError(line)

    def _tell(self, step: int, line: str) -> None:
        self._log(f"WARNING: {line}")
        self._record({"event": "checkpoint_failed", "step": step, "reason": line})

    def _commit(self, pending: _Pending, files: dict[str, tuple[int, str]]) -> None:
        final = self._at(pending.step)
        if final.exists():  # a bad one of the same step, walked past by restore()
            shutil.rmtree(final)
        metadata, facts = self._metadata, pending.facts
        manifest = {
            "step": pending.step,
            "world_size": self._world.size,
            "zero_stage": self._zero_stage,
            "format": WHOLE,
            "base": metadata.base,
            "config": metadata.config,
            "sampler": {**metadata.sampler, "step": pending.step, "epoch": facts["epoch"]},
            "valid_loss": facts["valid_loss"],
            "versions": metadata.versions,
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
        }
        checkpoint.commit(pending.partial, final, manifest)
        kept = [known for known in self.committed() if known <= pending.step]
        best = checkpoint.best(self._folder) if self._retention.best else None
        for old in kept[: -self._retention.keep]:
            if best is None or old != best.step:
                shutil.rmtree(self._at(old), ignore_errors=True)

    def restore(self, engine: Checkpointable) -> int:
        """Loads the newest valid checkpoint into `engine` and returns its step, or 0 when there is none.

        Raises UserError on every rank when it belongs to another base model or configuration, or is in shards of another world size.
        """
        saved, fault = collectives.share_from_main(self._choose() if self._world.is_main else None)
        if fault is not None:
            raise UserError(fault)
        if saved is None:
            return 0
        (engine.load_state if saved.form == WHOLE else engine.load_shards)(saved.folder)
        return int(saved.step)

    def load_best(self, engine: Checkpointable) -> SavedCheckpoint | None:
        """Loads the whole checkpoint of lowest validation loss; None, and nothing changes, where there is none."""
        saved = collectives.share_from_main(self._best_valid() if self._world.is_main else None)
        if saved is not None:
            engine.load_state(saved.folder)
        return saved  # type: ignore[no-any-return]

    def _choose(self) -> tuple[SavedCheckpoint | None, str | None]:
        """On rank 0: the checkpoint to load, and why it cannot be."""
        for partial in self._folder.glob("step-*.tmp"):  # of an attempt that was cut short
            shutil.rmtree(partial, ignore_errors=True)
        saved = self._newest_valid()
        if saved is None:
            return None, None
        if saved.base is not None and saved.base != self._metadata.base:
            return saved, (
                f"{saved.folder} belongs to a base model of fingerprint {saved.base}, and model.path holds one of "
                f"{self._metadata.base}; put the model back or choose another train.run_dir"
            )
        sampler = {key: saved.sampler.get(key, value) for key, value in self._metadata.sampler.items()}
        if sampler != self._metadata.sampler or saved.config not in (None, self._metadata.config):
            return saved, (
                f"{saved.folder} belongs to another configuration (fingerprint {saved.config}, batch {sampler}) than this run "
                f"({self._metadata.config}, {self._metadata.sampler}); remove it or choose another train.run_dir"
            )
        there, here = (saved.world_size, saved.zero_stage), (self._world.size, self._zero_stage)
        if there != here and saved.form == SHARDS:
            return saved, (
                f"{saved.folder} was written by {there[0]} workers at ZeRO stage {there[1]}, in shards that fit no other, and this "
                f"run has {here[0]} at stage {here[1]}; resume with cluster.num_workers={there[0]} cluster.zero_stage={there[1]}"
            )
        if there != here:
            self._log(f"{saved.folder.name}: from {there[0]} worker(s) at ZeRO stage {there[1]} to {here[0]} at stage {here[1]}")
        return saved, None

    def _newest_valid(self) -> SavedCheckpoint | None:
        for step in reversed(self.committed()):
            if not self._set_aside(self._at(step)):
                return checkpoint.read(self._at(step))
        return None

    def _best_valid(self) -> SavedCheckpoint | None:
        while (saved := checkpoint.best(self._folder)) is not None:
            if not self._set_aside(saved.folder):
                return saved
        return None

    def _set_aside(self, folder: Path) -> bool:
        """True, and a line, for a damaged checkpoint; its folder is kept under another name, to be looked at."""
        problems = checkpoint.verify(folder)
        if problems:
            self._log(f"WARNING: checkpoint passed over: {'; '.join(problems)}")
            bad = folder.with_name(folder.name + ".bad")
            shutil.rmtree(bad, ignore_errors=True)
            folder.rename(bad)
        return bool(problems)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
