"""Which files of a run directory its copy has, and in which order they may be believed. Knows names alone, no store."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rec_dist.data.prepared.location import Stored
from rec_dist.engine.checkpoint import COMMIT_NAME

CONFIG, FINISHED, OWNER = "config.json", "finished.json", "owner.json"
_OWN = ("attempt", "stacks", "stop", OWNER)  # of this attempt on these machines, or of the copy


def files_of(folder: Path) -> dict[str, list[int]]:
    """Every file that is copied, by its path: [bytes, time of change in ns]."""
    found = {}
    for top, folders, names in os.walk(folder):
        here = Path(top).relative_to(folder)
        folders[:] = [name for name in folders if not _is_own(here / name)]
        for name in names:
            if not _is_own(here / name):
                with suppress(FileNotFoundError):
                    found[str(here / name)] = state_of(Path(top) / name)
    return found


def state_of(path: Path) -> list[int]:
    """[bytes, time of change in ns]."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _is_own(path: Path) -> bool:
    """path: from the run directory."""
    name = path.name
    return name.startswith(".") or name.endswith((".tmp", ".bad")) or str(path) in _OWN


def order_of(name: str) -> tuple[bool, bool]:
    """Later ones say that earlier ones are there."""
    return name == FINISHED, Path(name).name == COMMIT_NAME


def is_urgent(name: str) -> bool:
    """Whether a loss of it would cost work; the rest changes all the time, and can wait."""
    return name.startswith(("checkpoints/", "model/")) or name == FINISHED


def wanted(files: Mapping[str, Stored], *, torn: bool = False) -> dict[str, Stored]:
    """The run's own of what lies in a copy, without checkpoints that were not copied whole, or with them."""
    whole = {str(Path(name).parent) for name in files if Path(name).name == COMMIT_NAME}
    return {
        name: stored
        for name, stored in files.items()
        if not _is_own(Path(name)) and (torn or not name.startswith("checkpoints/") or str(Path(name).parent) in whole)
    }


def newest_step(files: Mapping[str, Stored]) -> int:
    """Of the checkpoints that were copied whole; -1 without one."""
    steps = [Path(name).parent.name.removeprefix("step-") for name in files if Path(name).name == COMMIT_NAME]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def parts_of(folder: Path) -> list[Path]:
    """What is moved into place as one: files, folders, and each checkpoint, in the order in which they may be believed."""
    checkpoints = sorted((folder / "checkpoints").glob("*"))
    finished = [path for path in [folder / FINISHED] if path.is_file()]
    first = [path for path in sorted(folder.iterdir()) if path.name not in ("checkpoints", FINISHED)]
    return [*sorted(first, key=lambda path: path.name != CONFIG), *checkpoints, *finished]
