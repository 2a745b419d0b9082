"""`rec-dist prepare` with a URI as data.path: prepares on this machine, then uploads the files, manifest.json last.

Without a manifest there is no data set: readers reject an incomplete upload, and the next prepare repeats it.
"""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.prepared_data import cache_folder
from rec_dist.data.dataset.schema import MANIFEST_NAME
from rec_dist.data.dataset.verify import folder_faults
from rec_dist.data.prepare.prepare import Map, prepare
from rec_dist.data.sources import FileSet
from rec_dist.errors import UserError
from rec_dist.storage.files import make_folder
from rec_dist.storage.location import Location

logger = logging.getLogger(__name__)


def prepare_remote(config: DataConfig, *, tables: FileSet | None = None, ray_map: Callable[[], Map] | None = None) -> Manifest:
    """Writes the prepared data set of `config` to data.path and returns its manifest. Keeps it if it exists already.

    Raises UserError as prepare does, and if data.path holds something else or cannot be written.
    """
    location, staging = Location(config.path), cache_folder(config.cache_dir)
    make_folder(staging, "owner")
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=staging) as folder:
        local = Path(folder) / "prepared"
        manifest = prepare(config.model_copy(update={"path": str(local)}), tables=tables, ray_map=ray_map)
        if location.read(MANIFEST_NAME) is not None:
            return _kept(location, manifest)
        others = set(location.sizes()) - {entry.name for entry in manifest.files}
        if others:
            raise UserError(f"data.path ({location}) holds other files ({min(others)}); choose another data.path.")
        for entry in manifest.files:
            location.write(local / entry.name, entry.name)
        location.write(local / MANIFEST_NAME, MANIFEST_NAME)
    logger.info(f"written to {location}")
    return manifest


def _kept(location: Location, wanted: Manifest) -> Manifest:
    found = Manifest.load(location)
    if found != wanted:
        raise UserError(
            f"data.path ({location}) holds a data set of other settings, files or shards (fingerprint {found.fingerprint}, not "
            f"{wanted.fingerprint}); choose another data.path or remove that one."
        )
    if problems := folder_faults(location, found):
        raise UserError(f"data.path ({location}) is damaged: {problems[0]}; remove it and prepare again.")
    logger.info(f"{location} is already prepared from these files with these settings (fingerprint {found.fingerprint}): kept")
    return found
