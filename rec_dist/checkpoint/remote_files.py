"""Which files of a run directory its copy has, which of them are believed, and how they come into place. Knows no store."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from rec_dist.checkpoint.files import COMMIT_NAME, committed, folder_of, verify
from rec_dist.errors import UserError
from rec_dist.storage.checksums import broken
from rec_dist.storage.location import Stored, is_below

CONFIG, FINISHED, OWNER = "config.json", "finished.json", "owner.json"
_OWN = ("attempt", "stacks", "stop", OWNER)  # of this attempt on these machines, or of the copy
_CLAIMED = (CONFIG, "config.yaml")  # a run directory has them from its claim on, with its own place in them
_STEP = re.compile(r"checkpoints/step-([0-9]+)/.*")


def files_of(folder: Path) -> dict[str, list[int]]:
    """Every file that is copied, by its path: [bytes, time of change in ns]. checkpoints/ and the like may be links."""
    found = {}
    for top, folders, names in os.walk(folder, followlinks=True):
        here = Path(top).relative_to(folder)
        below = here.parts != ()  # deeper links may lead round in a circle
        folders[:] = [name for name in folders if not _is_own(here / name) and not (below and (Path(top) / name).is_symlink())]
        for name in names:
            if not _is_own(here / name):
                with suppress(FileNotFoundError):
                    about = (Path(top) / name).stat()
                    found[(here / name).as_posix()] = [about.st_size, about.st_mtime_ns]
    return found


def _is_own(path: Path | PurePosixPath) -> bool:
    """path: from the run directory."""
    name = path.name
    return name.startswith(".") or name.endswith((".tmp", ".bad")) or path.parts[0] in _OWN


def order_of(name: str) -> tuple[bool, bool]:
    """Later ones say that earlier ones are there."""
    return name == FINISHED, Path(name).name == COMMIT_NAME


def is_urgent(name: str) -> bool:
    """Whether a loss of it would cost work; the rest changes all the time, and can wait."""
    return name.startswith(("checkpoints/", "model/")) or name == FINISHED


def wanted(files: Mapping[str, Stored]) -> dict[str, Stored]:
    """The run's own of what lies in a copy, without checkpoints that lack their marker, and without names that are no path below."""
    whole = {step for name in files if (step := _step_of(name)) is not None and name.endswith(f"/{COMMIT_NAME}")}
    above = {str(folder) for name in files for folder in PurePosixPath(name).parents}
    return {
        name: stored
        for name, stored in files.items()
        if is_below(name)
        and name not in above
        and not _is_own(PurePosixPath(name))
        and (not name.startswith("checkpoints/") or _step_of(name) in whole)
    }


def _step_of(name: str) -> int | None:
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def newest_step(files: Iterable[str]) -> int:
    """Of the checkpoints with a marker; -1 without one."""
    return max((step for name in files if name.endswith(f"/{COMMIT_NAME}") and (step := _step_of(name)) is not None), default=-1)


def newest_valid(catalogue: Path) -> int:
    """The step of the newest checkpoint all of whose bytes are right; -1 without one."""
    return next((step for step in reversed(committed(catalogue)) if not verify(folder_of(catalogue, step))), -1)


def outdated(names: Iterable[str], run_dir: Path) -> set[str]:
    """Of `names` in the copy, those of checkpoints that are not here, while a newer one is."""
    here = committed(run_dir / "checkpoints")
    newest = max(here, default=-1)
    return {name for name in names if (step := _step_of(name)) is not None and step not in here and step < newest}


def drop_damaged(folder: Path, newest: int) -> list[str]:
    """Removes from a download what is damaged, and then what is not further than step `newest`; a line for each that is damaged."""
    lines = []
    for step in committed(folder / "checkpoints"):
        place = folder_of(folder / "checkpoints", step)
        if problems := verify(place):
            lines.append(f"checkpoint passed over: {'; '.join(problems)}")
        if problems or step <= newest:
            remove(place)
    try:
        problems = broken(folder / "model") if (folder / "model").is_dir() else ["there is none"]
    except UserError as fault:
        problems = [str(fault)]
    if problems and (folder / FINISHED).is_file():
        lines.append(f"its model is made again, from the last checkpoint: {problems[0]}")
        remove(folder / FINISHED)
        remove(folder / "model")
    if not (folder / FINISHED).is_file() and not committed(folder / "checkpoints"):
        remove(folder)  # nothing in it is further than what is here
        folder.mkdir()
    return lines


def install(folder: Path, run_dir: Path) -> None:
    """Moves a download into place: each file, folder and checkpoint as one, in the order in which they may be believed."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    last = [path for path in [folder / FINISHED] if path.is_file()]
    first = [path for path in sorted(folder.iterdir()) if path.name not in ("checkpoints", FINISHED, *_CLAIMED)]
    for part in [*first, *checkpoints, *last]:
        target = run_dir / part.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        arrived = target.with_name(f"{target.name}.tmp")
        remove(arrived)
        shutil.move(part, arrived)  # to another file system, where a link leads there
        remove(target)
        arrived.replace(target)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
