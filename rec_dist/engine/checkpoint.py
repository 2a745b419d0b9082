"""Our own catalogue of checkpoints: step-00000050/ with a manifest of sizes and hashes and a commit marker, renamed into place.

Why not the libraries': Ray's report() returning is no commit, a torn snapshot file blocks every restart and it never falls back;
DeepSpeed writes `latest` before its last barrier. Loading takes the newest valid one and walks back past bad ones, loudly.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.files import sha256, write_json
from rec_dist.runtime.world import World

MANIFEST_NAME, COMMIT_NAME = "manifest.json", "COMMITTED"


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: after `step` steps. form: Engine.state_format; base: a hash of the frozen model, or None."""

    step: int
    folder: Path
    world_size: int
    zero_stage: int
    form: str
    base: str | None


def verify(folder: Path) -> list[str]:
    """What is wrong with one checkpoint: missing, resized or changed files, no commit marker. Empty when it is whole."""
    if not (folder / COMMIT_NAME).is_file():
        return [f"{folder.name}: no commit marker, the write was cut short"]
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        int(manifest["step"]), int(manifest["world_size"]), int(manifest["zero_stage"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        return [f"{folder.name}: {MANIFEST_NAME} cannot be read ({fault!r})"]
    problems = []
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{folder.name}: {name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{folder.name}: {name} has {path.stat().st_size} bytes, not {size}")
        elif sha256(path) != digest:
            problems.append(f"{folder.name}: {name} has changed since it was written (other hash)")
    return problems


class Catalogue:
    """The checkpoints of one run. Every method but `committed` is a collective: all ranks call it together."""

    def __init__(
        self, folder: Path, world: World, *, keep: int, zero_stage: int, base: str | None, log: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._world = world
        self._keep = keep
        self._zero_stage = zero_stage
        self._base = base  # on rank 0; what does not train is not saved, so it must be the same when a run goes on
        self._log = log

    def committed(self) -> list[int]:
        """Steps of the folders that claim to be checkpoints, oldest first; their contents are not looked at."""
        names = [path.name for path in self._folder.glob("step-*") if path.is_dir() and not path.name.endswith(".tmp")]
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def save(self, engine: Engine, step: int) -> None:
        """Writes step-N.tmp on all ranks, then rank 0 hashes, commits, renames and removes the oldest beyond `keep`."""
        final = self._folder / f"step-{step:08d}"
        partial = final.with_name(final.name + ".tmp")
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        process_group.barrier()
        engine.save_state(partial)
        process_group.barrier()
        if self._world.is_main:
            self._commit(partial, final, step, engine.state_format)
        process_group.barrier()

    def _commit(self, partial: Path, final: Path, step: int, form: str) -> None:
        files: dict[str, Any] = {}
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            _sync(path)
            files[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest = {
            "step": step,
            "world_size": self._world.size,
            "zero_stage": self._zero_stage,
            "format": form,
            "base": self._base,
            "files": files,
        }
        write_json(partial / MANIFEST_NAME, manifest)
        (partial / COMMIT_NAME).touch()
        _sync(partial / COMMIT_NAME)
        _sync(partial)
        if final.exists():  # a bad one of the same step, walked past by restore()
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self._folder)
        kept = [known for known in self.committed() if known <= step]
        for old in kept[: -self._keep]:
            shutil.rmtree(self._folder / f"step-{old:08d}", ignore_errors=True)

    def restore(self, engine: Engine) -> int:
        """Loads the newest valid checkpoint into `engine` and returns its step, or 0 when there is none.

        Raises UserError on every rank when it belongs to another base model, or is in shards of another world size or ZeRO stage.
        """
        saved, fault = process_group.share_from_main(self._choose() if self._world.is_main else None)
        if fault is not None:
            raise UserError(fault)
        if saved is None:
            return 0
        engine.load_state(saved.folder, saved.form)
        return int(saved.step)

    def _choose(self) -> tuple[Saved | None, str | None]:
        """On rank 0: the checkpoint to load, and why it cannot be."""
        saved = self._newest_valid()
        if saved is None:
            return None, None
        if saved.base is not None and saved.base != self._base:
            return saved, (
                f"{saved.folder} belongs to a base model of fingerprint {saved.base}, and model.path holds one of {self._base}; put "
                "the model back or choose another train.run_dir"
            )
        there, here = (saved.world_size, saved.zero_stage), (self._world.size, self._zero_stage)
        if there == here:
            return saved, None
        if saved.form == "shards":
            return saved, (
                f"{saved.folder} was written by {there[0]} workers at ZeRO stage {there[1]}, in shards that fit no other, and this "
                f"run has {here[0]} at stage {here[1]}; resume with cluster.num_workers={there[0]} cluster.zero_stage={there[1]}"
            )
        self._log(f"{saved.folder.name}: from {there[0]} worker(s) at ZeRO stage {there[1]} to {here[0]} at stage {here[1]}")
        return saved, None

    def _newest_valid(self) -> Saved | None:
        for step in reversed(self.committed()):
            folder = self._folder / f"step-{step:08d}"
            problems = verify(folder)
            if not problems:
                manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
                form, base = manifest.get("format", "shards"), manifest.get("base")
                return Saved(step, folder, int(manifest["world_size"]), int(manifest["zero_stage"]), form, base)
            self._log(f"WARNING: checkpoint passed over: {'; '.join(problems)}")
            bad = folder.with_name(folder.name + ".bad")  # kept to be looked at; no longer counted
            shutil.rmtree(bad, ignore_errors=True)
            folder.rename(bad)
        return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
