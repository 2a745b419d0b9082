"""`rec-dist verify`: checks every hash of a prepared data set, of a run's checkpoints and model, of one checkpoint or model."""

import logging
from pathlib import Path

from rec_dist.checkpoint.files import committed, folder_of, is_checkpoint
from rec_dist.checkpoint.files import verify as verify_checkpoint
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.node_cache import NodeCache
from rec_dist.data.dataset.prepared_data import CACHE_BYTES, cache_folder
from rec_dist.data.dataset.schema import MANIFEST_NAME
from rec_dist.data.dataset.verify import verify as verify_data
from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.methods.ensemble.folder import MEMBERS_NAME, lost_files
from rec_dist.storage.checksums import CHECKSUMS_NAME, WRITE_AGAIN, damaged_files
from rec_dist.storage.location import Location

logger = logging.getLogger(__name__)


def verify(target: str, *, cache: str | None = None) -> None:
    """Checks every hash of a prepared data set (a folder or a URI), of a run's checkpoints and model, or of one of these.

    Of a data set in a store it also checks what this node's cache holds of it, and removes what is damaged there. cache: the folder
    that data.cache_dir names, None for the default (REC_DIST_CACHE). Raises UserError that names what is damaged.
    """
    location = Location(target)
    if cache is not None and not location.is_remote:
        raise UserError(f"--cache-dir ({cache}) has no effect on {location}, which lies on this machine; leave it out")
    way_out = "a restart walks past what is damaged"
    if not location.is_remote and is_checkpoint(location.folder):
        problems, what = verify_checkpoint(location.folder), "checkpoint"
    elif location.is_remote or (location.folder / MANIFEST_NAME).is_file():
        manifest = Manifest.load(location)
        if location.is_remote:
            for fault in NodeCache(cache_folder(cache), CACHE_BYTES).damaged(manifest.files):
                logger.warning(f"{fault}; removed from this node's cache, and fetched again when it is needed")
        problems, what, way_out = verify_data(location), "data set", "remove it and run `rec-dist prepare CONFIG`"
    elif (location.folder / "checkpoints").is_dir():
        problems, what = _of_run(location.folder / "checkpoints")
        of_model = _of_model(location.folder / "model")
        problems, way_out = problems + of_model, TRAIN_AGAIN if of_model else way_out
        what += " and model/" if (location.folder / "model" / CHECKSUMS_NAME).is_file() else ""
    elif (location.folder / "model" / CHECKSUMS_NAME).is_file():  # a run that was fitted at once, without checkpoints
        problems, what, way_out = _of_model(location.folder / "model"), "model/", TRAIN_AGAIN
    elif (location.folder / CHECKSUMS_NAME).is_file():
        problems, what, way_out = damaged_files(location.folder), "model", WRITE_AGAIN
    else:
        raise UserError(
            f"{location} is neither a prepared data set nor a run directory with checkpoints or a model, nor an exported model "
            f"({CHECKSUMS_NAME} is missing); give data.path, train.run_dir or the folder of an export"
        )
    if problems:
        raise UserError(
            f"{location}: {len(problems)} {'fault' if len(problems) == 1 else 'faults'}: {'; '.join(problems)}; {way_out}"
        )
    logger.info(f"{location}: {what} whole")


def _of_model(model: Path) -> list[str]:
    """Faults of a model folder, and of the members that an ensemble keeps in it."""
    folders = [model, *sorted(model.glob(f"**/{MEMBERS_NAME}/*/model"))]
    problems = {folder: [*damaged_files(folder), *lost_files(folder)] for folder in folders}
    return [f"{folder.relative_to(model.parent)}/{problem}" for folder, found in problems.items() for problem in found]


def _of_run(catalogue: Path) -> tuple[list[str], str]:
    """(faults, what was checked): of all checkpoints, and of folders whose names hide them from a run."""
    folders = [folder_of(catalogue, step) for step in committed(catalogue)]
    problems = [problem for folder in folders for problem in verify_checkpoint(folder)]
    for path in sorted(catalogue.glob("step-*")):
        if path not in folders and path.suffix not in (".tmp", ".bad"):
            problems.append(f"{path.name}: no name of a checkpoint, so that no run will find it")
    return problems, f"{len(folders)} {'checkpoint' if len(folders) == 1 else 'checkpoints'}"
