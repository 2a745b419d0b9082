"""`rec-dist verify`: every hash of a prepared data set, wherever it lies, or of all checkpoints of a run."""

from collections.abc import Callable

from rec_dist.data.location import Location
from rec_dist.data.manifest import Manifest
from rec_dist.data.schema import MANIFEST_NAME
from rec_dist.data.verify import verify as verify_data
from rec_dist.engine.checkpoint import verify as verify_checkpoint
from rec_dist.runtime.errors import UserError


def verify(target: str, *, log: Callable[[str], None]) -> None:
    """Checks every hash of a prepared data set (a folder or a URI), or of all checkpoints of a run.

    Raises UserError that names what is damaged.
    """
    location = Location(target)
    if location.is_remote or (location.folder / MANIFEST_NAME).is_file():
        Manifest.load(location)
        problems, what = verify_data(location), "data set"
    elif (location.folder / "checkpoints").is_dir():
        folders = sorted(path for path in (location.folder / "checkpoints").glob("step-*") if path.suffix not in (".tmp", ".bad"))
        problems, what = [problem for folder in folders for problem in verify_checkpoint(folder)], f"{len(folders)} checkpoints"
    else:
        raise UserError(f"{location} is neither a prepared data set nor a run directory with checkpoints")
    if problems:
        way_out = "remove it and run `rec-dist prepare CONFIG`" if what == "data set" else "a restart walks past what is damaged"
        raise UserError(f"{location}: {len(problems)} fault(s): {'; '.join(problems)}; {way_out}")
    log(f"{location}: {what} whole")
