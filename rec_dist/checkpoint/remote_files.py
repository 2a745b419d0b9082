"""Files of the remote copy: which files of a run are copied, which of a copy are trusted, and how a download is installed.

Nothing here knows about stores.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from rec_dist.checkpoint.files import committed, committed_steps, folder_of, is_marker, step_of, verify
from rec_dist.errors import UserError
from rec_dist.storage.checksums import damaged_files
from rec_dist.storage.files import make_folder, put_in_place
from rec_dist.storage.location import Stored
from rec_dist.storage.uri import is_below

CONFIG, FINISHED, OWNER = "config.json", "finished.json", "owner.json"
_OWN = ("attempt", "stacks", "stop", OWNER)  # these belong to one attempt on one machine, or to the copy itself
_CLAIMED = (CONFIG, "config.yaml")  # written when a run claims its directory, and they hold its own path


def files_of(folder: Path) -> dict[str, list[int]]:
    """All files to copy, by their paths: [bytes, time of change in ns]. checkpoints/ and other top folders may be links."""
    found = {}
    for top, folders, names in os.walk(folder, followlinks=True):
        here = Path(top).relative_to(folder)
        below = here.parts != ()  # deeper links may form a circle
        folders[:] = [name for name in folders if not _is_own(here / name) and not (below and (Path(top) / name).is_symlink())]
        for name in names:
            if not _is_own(here / name):
                with suppress(FileNotFoundError):
                    about = (Path(top) / name).stat()
                    found[(here / name).as_posix()] = [about.st_size, about.st_mtime_ns]
    return found


def _is_own(path: Path | PurePosixPath) -> bool:
    """Whether a file, by its path from the run directory, is never copied."""
    name = path.name
    return name.startswith(".") or name.endswith((".tmp", ".bad")) or path.parts[0] in _OWN


def order_of(name: str) -> tuple[bool, bool]:
    """A sort key: a file that vouches for others comes after them."""
    return name == FINISHED, is_marker(name)


def is_urgent(name: str) -> bool:
    """Whether losing the file would cost work. The other files change all the time and can wait."""
    return name.startswith(("checkpoints/", "model/")) or name == FINISHED


def wanted(files: Mapping[str, Stored]) -> dict[str, Stored]:
    """The files of a copy that belong to the run.

    Leaves out checkpoints without a commit marker, and names that are not valid paths below a folder.
    """
    whole = committed_steps(files)
    above = {str(folder) for name in files for folder in PurePosixPath(name).parents}
    return {
        name: stored
        for name, stored in files.items()
        if is_below(name)
        and name not in above
        and not _is_own(PurePosixPath(name))
        and (not name.startswith("checkpoints/") or step_of(name) in whole)
    }


def newest_step(files: Iterable[str]) -> int:
    """The newest step whose checkpoint has a commit marker; -1 if there is none."""
    return max(committed_steps(files), default=-1)


def newest_valid(checkpoints: Path) -> int:
    """The step of the newest checkpoint that is whole; -1 if there is none."""
    return next((step for step in reversed(committed(checkpoints)) if not verify(folder_of(checkpoints, step))), -1)


def outdated(names: Iterable[str], run_dir: Path) -> set[str]:
    """The files in the copy of checkpoints that this machine no longer has, if it has a newer one."""
    here = committed(run_dir / "checkpoints")
    newest = max(here, default=-1)
    return {name for name in names if (step := step_of(name)) is not None and step not in here and step < newest}


def drop_damaged(folder: Path, newest: int) -> list[str]:
    """Removes damaged parts from a download, and checkpoints up to step `newest`. Returns a line for each damaged part."""
    lines = []
    for step in committed(folder / "checkpoints"):
        place = folder_of(folder / "checkpoints", step)
        if problems := verify(place):
            lines.append(f"checkpoint passed over: {'; '.join(problems)}")
        if problems or step <= newest:
            remove(place)
    try:
        problems = damaged_files(folder / "model") if (folder / "model").is_dir() else ["there is none"]
    except UserError as fault:
        problems = [str(fault)]
    if problems and (folder / FINISHED).is_file():
        lines.append(f"the run will write model/ again from its last checkpoint: {problems[0]}")
        remove(folder / FINISHED)
        remove(folder / "model")
    if not (folder / FINISHED).is_file() and not committed(folder / "checkpoints"):
        remove(folder)  # nothing in the download is ahead of this machine
        folder.mkdir()
    return lines


def install(folder: Path, run_dir: Path) -> None:
    """Moves a download into place, each file, folder and checkpoint whole, and those that vouch for others last."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    last = [path for path in [folder / FINISHED] if path.is_file()]
    first = [path for path in sorted(folder.iterdir()) if path.name not in ("checkpoints", FINISHED, *_CLAIMED)]
    for part in [*first, *checkpoints, *last]:
        target = run_dir / part.relative_to(folder)
        make_folder(target.parent)
        arrived = target.with_name(f"{target.name}.tmp")
        remove(arrived)
        shutil.move(part, arrived)  # a link may lead to another file system
        if target.is_dir() and not arrived.is_dir():
            remove(target)  # nothing of a run: a folder where a file belongs
        put_in_place(arrived, target)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
