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
    """A committed checkpoint: after `step` steps."""

    step: int
    folder: Path
    world_size: int
    zero_stage: int


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

    def __init__(self, folder: Path, world: World, *, keep: int, zero_stage: int, log: Callable[[str], None]) -> None:
        self._folder = folder
        self._world = world
        self._keep = keep
        self._zero_stage = zero_stage
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
            self._commit(partial, final, step)
        process_group.barrier()

    def _commit(self, partial: Path, final: Path, step: int) -> None:
        files: dict[str, Any] = {}
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            _sync(path)
            files[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest = {"step": step, "world_size": self._world.size, "zero_stage": self._zero_stage, "files": files}
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

        Raises UserError on every rank when it was written at another world size or ZeRO stage.
        """
        saved = process_group.share_from_main(self._newest_valid() if self._world.is_main else None)
        if saved is None:
            return 0
        if (saved.world_size, saved.zero_stage) != (self._world.size, self._zero_stage):
            raise UserError(
                f"{saved.folder} was written by {saved.world_size} workers at ZeRO stage {saved.zero_stage}, and this run has "
                f"{self._world.size} at stage {self._zero_stage}; resume with cluster.num_workers={saved.world_size} "
                f"cluster.zero_stage={saved.zero_stage}"
            )
        engine.load_state(saved.folder)
        return int(saved.step)

    def _newest_valid(self) -> Saved | None:
        for step in reversed(self.committed()):
            folder = self._folder / f"step-{step:08d}"
            problems = verify(folder)
            if not problems:
                manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
                return Saved(step, folder, int(manifest["world_size"]), int(manifest["zero_stage"]))
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
