"""Where the prepared data set goes: a folder, or a URI. It is made in a folder beside the first, or in the cache, and appears whole.

A folder is renamed into place. Files go to a URI one by one, manifest.json last: without a manifest there is no data set, so
readers reject an incomplete upload, and the next prepare repeats it.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import PREFERENCES, Manifest
from rec_dist.data.dataset.prepared_data import cache_folder
from rec_dist.data.dataset.schema import ITEMS_NAME, MANIFEST_NAME, SPLITS
from rec_dist.data.dataset.verify import folder_faults
from rec_dist.errors import UserError
from rec_dist.storage.files import beside, lock, make_folder, put_in_place
from rec_dist.storage.location import Location
from rec_dist.storage.outputs import check_output
from rec_dist.storage.temporary import temporary_folder

logger = logging.getLogger(__name__)

# Files of an upload that was cut off; .tmp is what Location.write leaves on HDFS.
_OWN = re.compile(
    rf"({re.escape(ITEMS_NAME)}|(index-)?({'|'.join(SPLITS)})(-\d{{5}}-of-\d{{5}})?\.arrow)(\.tmp)?|{re.escape(MANIFEST_NAME)}\.tmp"
)


def check_target(location: Location) -> None:
    """Raises UserError if a folder of this machine cannot become the data set."""
    # an existing folder is kept or rejected for its contents, so it need not be writable
    if not location.is_remote and not os.path.exists(location.folder):  # Path.exists raises for a name that is too long
        check_output(location.folder, "data.path", folder=True)


def existing(location: Location, mark: str, num_shards: int) -> Manifest | None:
    """The manifest at `location` if it is exactly the data set with fingerprint `mark` in num_shards shards; None if nothing is there.

    A URI may hold files of an upload that was cut off. Raises UserError if something else is there.
    """
    if location.is_remote:
        names = location.sizes()
        others = [name for name in names if not _OWN.fullmatch(name)]
        if MANIFEST_NAME not in names and others:
            raise UserError(f"data.path ({location}) holds other files ({min(others)}); choose another data.path.")
        if MANIFEST_NAME not in names:
            return None
    else:
        folder = location.folder
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        if not (folder / MANIFEST_NAME).is_file():
            raise UserError(f"data.path ({location}) exists and is not a prepared data set; choose another data.path.")
    manifest = Manifest.load(location)
    if manifest.fingerprint != mark:
        raise UserError(
            f"data.path ({location}) holds a data set of other settings or files "
            f"(fingerprint {manifest.fingerprint}, not {mark}); choose another data.path or remove that folder."
        )
    if problems := folder_faults(location, manifest):
        raise UserError(f"data.path ({location}) is damaged: {problems[0]}; remove the folder and prepare again.")
    found = len(manifest.splits["train"].shards)
    if found != num_shards:
        raise UserError(
            f"data.path ({location}) holds this data set in {found} shards per split, and data.num_shards is {num_shards}; "
            "choose another data.path or remove that folder."
        )
    return manifest


@contextmanager
def staged(location: Location, config: DataConfig) -> Iterator[Path]:
    """An empty folder to make the data set in. It and a folder of the same name with the suffix .work are removed at the end."""
    if location.is_remote:
        with temporary_folder(cache_folder(config.cache_dir), "prepare-") as folder:
            made = folder / "prepared"
            made.mkdir()
            yield made
        return
    made = beside(location.folder)
    make_folder(made, config.access)
    held = _clear_and_hold(location.folder, made.with_suffix(".lock"))
    try:
        yield made
    finally:
        shutil.rmtree(made.with_suffix(".work"), ignore_errors=True)
        shutil.rmtree(made, ignore_errors=True)
        made.with_suffix(".lock").unlink(missing_ok=True)
        if held is not None:
            os.close(held)


def publish(location: Location, made: Path, manifest: Manifest, num_shards: int) -> Manifest:
    """Puts the data set that is in `made` in its place. Shards that are not there have been written to the URI by jobs.

    Another process may have prepared it meanwhile: then its data set is kept. Raises UserError if that is another one, except where
    jobs have written over its shards already: then this one replaces it.
    """
    if location.is_remote:
        is_here = all((made / entry.name).exists() for entry in manifest.files)
        kept = existing(location, manifest.fingerprint, num_shards) if is_here else None
        if kept is not None:
            return kept
        for name in set(filter(_OWN.fullmatch, location.sizes())) - {entry.name for entry in manifest.files}:
            location.remove(name)  # of an upload in another number of shards, which was cut off
        for entry in manifest.files:
            if (made / entry.name).exists():
                location.write(made / entry.name, entry.name)
        location.write(made / MANIFEST_NAME, MANIFEST_NAME)
    else:
        try:
            put_in_place(made, location.folder, replace=False)
        except OSError:
            kept = existing(location, manifest.fingerprint, num_shards)
            if kept is None:
                raise
            return kept
    if manifest.kind == PREFERENCES:
        logger.info(f"prepared {location}: {manifest.counts['rows']} preference rows, fingerprint {manifest.fingerprint}")
        return manifest
    for name in SPLITS:
        logger.info(f"{name}: {manifest.splits[name].rows} users, {manifest.splits[name].targets} targets")
    logger.info(f"prepared {location}: {manifest.counts['items']} items, fingerprint {manifest.fingerprint}")
    return manifest


def _clear_and_hold(target: Path, own: Path) -> int | None:
    """Locks the file `own` for this attempt, and removes what killed attempts left beside `target`.

    An attempt counts as killed if nobody holds its lock; it may have run on any machine that shares the disk. Returns the lock,
    or None if the file system has no locks.
    """
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.") and path.suffix == ".lock" and path != own:
            try:
                left = lock(path)
            except OSError:  # that attempt is still running
                continue
            for suffix in (".tmp", ".work"):
                shutil.rmtree(path.with_suffix(suffix), ignore_errors=True)
            path.unlink(missing_ok=True)
            os.close(left)
    try:
        return lock(own)
    except OSError:
        own.unlink(missing_ok=True)
        return None
