"""A checkpoint on disk: step-00000050/ with the files of the state, a manifest with their sizes and hashes, and a commit marker.

A folder is a checkpoint only if it was renamed into place, has the marker, and matches its manifest in every byte. The manifest
has a checksum of itself, since a flipped bit in its step or validation loss would go unnoticed.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rec_dist.storage.checksums import FileEntry, damage, parse_entry, parse_manifest, write_manifest
from rec_dist.storage.files import put_in_place

_MANIFEST_NAME, _COMMIT_NAME = "manifest.json", "COMMITTED"
_FORMAT_VERSION = 2
_NAME = re.compile(r"step-([0-9]+)")
_PATH = re.compile(r"checkpoints/step-([0-9]+)/.+")
FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError)
_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "world_size": (int,),
    "zero_stage": (int,),
    "base": (str, type(None)),
    "config": (str,),
    "sampler": (dict,),
    "valid_loss": (float, type(None)),
    "versions": (dict,),
}


@dataclass(frozen=True)
class CheckpointMetadata:
    """What the checkpoints of a run belong to. base: a fingerprint of the frozen model. config: a fingerprint of the settings.

    sampler: plain values that give the position in the data, together with the step: the seed, and the examples per epoch and
    per step. There is no other state, because order, draws, dropout and learning rate are functions of these and the step.
    """

    base: str | None
    config: str
    sampler: dict[str, int]
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Manifest:
    """Everything manifest.json says: what CheckpointMetadata says of the run, and the state after `step` steps."""

    step: int
    world_size: int
    zero_stage: int
    base: str | None
    config: str
    sampler: dict[str, int]
    valid_loss: float | None
    versions: dict[str, str | None]
    files: list[FileEntry]


@dataclass(frozen=True)
class SavedCheckpoint(Manifest):
    """A committed checkpoint and its folder."""

    folder: Path


def read(folder: Path) -> SavedCheckpoint:
    """Reads a checkpoint's manifest. Raises OSError, ValueError, KeyError, TypeError or AttributeError if it is damaged."""
    body = parse_manifest((folder / _MANIFEST_NAME).read_bytes(), _FORMAT_VERSION)
    files = [parse_entry(value) for value in body.pop("files")]
    saved = SavedCheckpoint(**body, files=files, folder=folder)
    for name, kinds in _KINDS.items():
        if type(getattr(saved, name)) not in kinds:
            raise TypeError(f"{name} is {str(getattr(saved, name))[:60]!r}")
    match = _NAME.match(folder.name)
    if match and int(match[1]) != saved.step:
        raise ValueError(f"belongs to step {saved.step}")
    return saved


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return checkpoints / f"step-{step:08d}"


def committed(checkpoints: Path) -> list[int]:
    """The steps of all folders that are named as checkpoints, oldest first. Does not look into the folders."""
    found = [(path, match) for path in checkpoints.glob("step-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted(int(match[1]) for path, match in found if folder_of(checkpoints, int(match[1])).name == path.name)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a commit marker."""
    return (folder / _COMMIT_NAME).is_file()


def step_of(name: str) -> int | None:
    """The step of the checkpoint that holds the file `name`, a path from the run directory; None for any other file."""
    match = _PATH.fullmatch(name)
    return int(match[1]) if match else None


def is_marker(name: str) -> bool:
    """Whether the file `name`, a path from the run directory, is the commit marker of a checkpoint."""
    return step_of(name) is not None and name.split("/")[2:] == [_COMMIT_NAME]


def committed_steps(names: Iterable[str]) -> set[int]:
    """The steps of the checkpoints whose commit markers are among `names`, paths from the run directory."""
    return {step for name in names if is_marker(name) and (step := step_of(name)) is not None}


def best(checkpoints: Path) -> SavedCheckpoint | None:
    """The checkpoint with the lowest validation loss, the earliest of equals; None if none was validated. Checks no hashes."""
    validated = []
    for step in committed(checkpoints):
        try:
            saved = read(folder_of(checkpoints, step))
        except FAULTS:  # whoever loads the damaged one reports it
            continue
        if saved.valid_loss is not None:
            validated.append((saved.valid_loss, saved.step, saved))
    return min(validated)[2] if validated else None


def verify(folder: Path) -> list[str]:
    """Checks one checkpoint and returns a line for each fault: a missing, resized, changed or stray file, or no commit marker."""
    if not is_checkpoint(folder):
        return [f"{folder.name}: no commit marker, so the write was cut short"]
    try:
        files = read(folder).files
    except ValueError as fault:
        return [f"{folder.name}: {_MANIFEST_NAME} {fault}"]
    except FAULTS as fault:
        return [f"{folder.name}: {_MANIFEST_NAME} cannot be read ({fault!r})"]
    problems = [f"{_COMMIT_NAME} is not empty"] if (folder / _COMMIT_NAME).stat().st_size else []
    strays = {path.name for path in folder.glob("*.safetensors")} - {entry.name for entry in files}
    problems += [f"the manifest does not name {name}" for name in sorted(strays)]
    return [f"{folder.name}: {problem}" for problem in problems + damage(folder, files)]


def commit(partial: Path, final: Path, manifest: Manifest) -> None:
    """Makes `partial`, which holds the files of all ranks, the checkpoint `final`, in place of a damaged one. Raises OSError."""
    write_manifest(partial / _MANIFEST_NAME, _FORMAT_VERSION, asdict(manifest))
    (partial / _COMMIT_NAME).touch()
    put_in_place(partial, final)
