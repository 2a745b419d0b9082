"""A checkpoint on disk: step-00000050/ with the files of the state, a manifest of their sizes and hashes, and a commit marker.

What is not renamed into place, or lacks the marker, or differs from its manifest by one byte, is no checkpoint. The manifest has a
checksum of itself: a step or a validation loss that flips in it would be believed.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.storage.files import fingerprint, json_text, sha256, write_json

MANIFEST_NAME, COMMIT_NAME = "manifest.json", "COMMITTED"
WHOLE, SHARDS = "whole", "shards"  # form: whole_state.py's, for any world size and stage; DeepSpeed's, of early versions


_NAME = re.compile(r"step-([0-9]+)")
_FIELDS = frozenset(
    ("step", "world_size", "zero_stage", "format", "base", "config", "sampler", "valid_loss", "versions", "files", "checksum")
)


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint of a run belongs to. base: a fingerprint of the frozen model. config: of what makes the run.

    batch: plain values that, with the step, make the position in the data: seed, examples of an epoch and of a step. There is no other
    state: order, draws, dropout and learning rate are functions of these and the step.
    """

    base: str | None
    config: str
    sampler: dict[str, int]
    versions: dict[str, str | None]


@dataclass(frozen=True)
class SavedCheckpoint:
    """A committed checkpoint: after `step` steps. What early versions did not write is None or empty."""

    step: int
    folder: Path
    world_size: int
    zero_stage: int
    form: str
    base: str | None
    config: str | None
    sampler: dict[str, int]
    valid_loss: float | None


def read(folder: Path) -> SavedCheckpoint:
    """What its manifest says. Raises OSError, ValueError, KeyError or TypeError where that is damaged."""
    return _saved(folder, _manifest(folder))


def _saved(folder: Path, manifest: dict[str, Any]) -> SavedCheckpoint:
    return SavedCheckpoint(
        step=int(manifest["step"]),
        folder=folder,
        world_size=int(manifest["world_size"]),
        zero_stage=int(manifest["zero_stage"]),
        form=manifest.get("format", SHARDS),
        base=manifest.get("base"),
        config=manifest.get("config"),
        sampler=dict(manifest.get("sampler", {})),
        valid_loss=manifest.get("valid_loss"),
    )


def _manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json holds, as it was written. Raises OSError, ValueError or TypeError where it is not."""
    text = (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    manifest: dict[str, Any] = json.loads(text)
    unknown = set(manifest) - _FIELDS
    if unknown:
        raise ValueError(f"it has the field {min(unknown)!r}, which no checkpoint has")
    body = {name: value for name, value in manifest.items() if name != "checksum"}
    if manifest.get("checksum", fingerprint(body)) != fingerprint(body):  # early versions wrote none
        raise ValueError("it does not match its checksum: it was changed after it was written")
    match = _NAME.match(folder.name)
    if match and int(match[1]) != int(manifest["step"]):
        raise ValueError(f"it is of step {manifest['step']}")
    return manifest


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return checkpoints / f"step-{step:08d}"


def committed(checkpoints: Path) -> list[int]:
    """Steps of the folders that claim to be checkpoints, oldest first; their contents are not looked at."""
    found = [(path, match) for path in checkpoints.glob("step-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted(int(match[1]) for path, match in found if folder_of(checkpoints, int(match[1])).name == path.name)


def best(checkpoints: Path) -> SavedCheckpoint | None:
    """The one of lowest validation loss, the earliest of equals, hashes not looked at; None where none was validated."""
    validated = []
    for step in committed(checkpoints):
        try:
            saved = read(folder_of(checkpoints, step))
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
        manifest = _manifest(folder)
        _saved(folder, manifest)  # raises where a field is none of its kind
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        return [f"{folder.name}: {MANIFEST_NAME} cannot be read ({fault!r})"]
    problems = []
    if manifest.get("checksum") is not None and (folder / MANIFEST_NAME).read_text(encoding="utf-8") != json_text(manifest):
        problems.append(f"{folder.name}: {MANIFEST_NAME} is spaced otherwise than it was written")
    if (folder / COMMIT_NAME).stat().st_size:
        problems.append(f"{folder.name}: {COMMIT_NAME} is not empty")
    strays = {path.name for path in folder.glob("*.safetensors")} - files.keys()
    problems += [f"{folder.name}: the manifest does not name {name}" for name in sorted(strays)]
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
    write_json(partial / MANIFEST_NAME, {**manifest, "checksum": fingerprint(json.loads(json.dumps(manifest)))})
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
