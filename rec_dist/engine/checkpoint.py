"""A checkpoint on disk: step-00000050/ with the files of the state, a manifest of their sizes and hashes, and a commit marker.

What is not renamed into place, or lacks the marker, or differs from its manifest by one byte, is no checkpoint.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.runtime.files import sha256, write_json

MANIFEST_NAME, COMMIT_NAME = "manifest.json", "COMMITTED"
WHOLE, SHARDS = "whole", "shards"  # form: whole_state.py's, for any world size and stage; DeepSpeed's, of early versions


@dataclass(frozen=True)
class Origin:
    """What a checkpoint of a run belongs to. base: a fingerprint of the frozen model. config: of what makes the run.

    stream: plain values that, with the step, make the position in the data: seed, units of an epoch and of a step. There is no other
    state: order, draws, dropout and learning rate are functions of these and the step.
    """

    base: str | None
    config: str
    stream: dict[str, int]
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: after `step` steps. What early versions did not write is None or empty."""

    step: int
    folder: Path
    world_size: int
    zero_stage: int
    form: str
    base: str | None
    config: str | None
    stream: dict[str, int]
    valid_loss: float | None


def read(folder: Path) -> Saved:
    """What its manifest says. Raises OSError, ValueError, KeyError or TypeError where that is damaged."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    return Saved(
        step=int(manifest["step"]),
        folder=folder,
        world_size=int(manifest["world_size"]),
        zero_stage=int(manifest["zero_stage"]),
        form=manifest.get("format", SHARDS),
        base=manifest.get("base"),
        config=manifest.get("config"),
        stream=dict(manifest.get("stream", {})),
        valid_loss=manifest.get("valid_loss"),
    )


def folder_of(catalogue: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return catalogue / f"step-{step:08d}"


def committed(catalogue: Path) -> list[int]:
    """Steps of the folders that claim to be checkpoints, oldest first; their contents are not looked at."""
    names = [path.name.removeprefix("step-") for path in catalogue.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def best(catalogue: Path) -> Saved | None:
    """The one of lowest validation loss, the earliest of equals, hashes not looked at; None where none was validated."""
    validated = []
    for step in committed(catalogue):
        try:
            saved = read(folder_of(catalogue, step))
        except (OSError, ValueError, KeyError, TypeError):  # damaged; who loads it says so
            continue
        if saved.valid_loss is not None:
            validated.append((saved.valid_loss, saved.step, saved))
    return min(validated)[2] if validated else None


def verify(folder: Path) -> list[str]:
    """What is wrong with one checkpoint: missing, resized or changed files, no commit marker. Empty when it is whole."""
    if not (folder / COMMIT_NAME).is_file():
        return [f"{folder.name}: no commit marker, the write was cut short"]
    try:
        read(folder)
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
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


def commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Makes `partial`, whose files are on disk already, the checkpoint `final`. Raises OSError."""
    write_json(partial / MANIFEST_NAME, manifest)
    (partial / COMMIT_NAME).touch()
    sync(partial / COMMIT_NAME)
    sync(partial)
    partial.rename(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """A file or the entries of a folder, on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
