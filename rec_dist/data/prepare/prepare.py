"""`rec-dist prepare`: turns raw files into a prepared data set.

Small sources are prepared in memory; large ones through files on disk, on this machine or by the processes of a cluster. All
ways write the same bytes. The result is a pure function of the settings and the bytes of the sources, and appears whole or not
at all.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import PREFERENCES, Manifest
from rec_dist.data.dataset.schema import FORMAT_VERSION, MANIFEST_NAME, SPLITS
from rec_dist.data.dataset.verify import folder_faults
from rec_dist.data.prepare.blockwise.driver import Sizes, prepare_blockwise
from rec_dist.data.prepare.in_memory import prepare_in_memory
from rec_dist.data.prepare.known_sources import find_source
from rec_dist.data.prepare.preferences import check_settings, prepare_preferences
from rec_dist.data.prepare.windows import prepare_windows
from rec_dist.data.sources import FileSet, open_source
from rec_dist.data.sources.benchmarks import BENCHMARKS
from rec_dist.data.sources.packed import packing
from rec_dist.errors import UserError
from rec_dist.storage.checksums import describe
from rec_dist.storage.disk import writing
from rec_dist.storage.files import beside, fingerprint, lock, make_folder, put_in_place
from rec_dist.storage.location import Location
from rec_dist.storage.outputs import check_output
from rec_dist.storage.uri import local_path

logger = logging.getLogger(__name__)

# With prepare_on=auto, sources of this size or more are prepared on Ray. In memory, 128 MiB of text are about 4 million rows, and
# take 1.3 GB and 8 s; Ray takes 20-30 s to start. A compressed file counts five times its size.
LARGE_BYTES = 1 << 27
_PACKED_RATIO = 5
_LATER = ("category", "train_files", "merge_equal_titles", "clean_text", "cold_items_fraction")

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


def prepare(
    config: DataConfig,
    *,
    tables: FileSet | None = None,
    ray_map: Callable[[], Map] | None = None,
    sizes: Sizes | None = None,
) -> Manifest:
    """Writes the prepared data set of `config` to data.path and returns its manifest. Keeps it if it exists already.

    tables: what write_tables made, in place of data.source.
    ray_map: connects to Ray and returns its map, (function, jobs) -> results in the order of the jobs; None if there is no Ray.
    Raises UserError if sources cannot be read, settings leave a split empty, or data.path holds something else.
    """
    if config.split != "leave_one_out" and config.valid_fraction + config.test_fraction >= 1:
        raise UserError(
            f"data.valid_fraction ({config.valid_fraction}) + data.test_fraction ({config.test_fraction}) leave "
            "nothing to train on; keep their sum below 1."
        )
    if config.split == "global_temporal" and config.test_fraction == 0 and config.format not in BENCHMARKS:
        raise UserError("data.test_fraction=0 leaves no test split, which only data.split=user_ratio can do without; raise it.")
    target = local_path(config.path)
    if not os.path.exists(target):  # an existing folder is kept or rejected for its contents, so it need not be writable
        check_output(target, "data.path", folder=True)
    found = tables or find_source(config)
    before = [_state(path) for path in found.files]
    sources = [describe(path, 0) for path in found.files]
    settings = _settings(config, found)
    shaping = {
        name: value for name, value in settings.items() if name != "num_shards"
    }  # a run can continue with another number of shards
    mark = fingerprint([FORMAT_VERSION, shaping, [(entry.name, entry.sha256) for entry in sources]])
    kept = _existing(target, mark, config.num_shards)
    if kept is not None:
        logger.info(f"{target} is already prepared from these files with these settings (fingerprint {mark}): kept")
        return kept
    head: dict[str, Any] = {"fingerprint": mark, "source": str(config.source), "settings": settings, "sources": sources}
    place = choose_place(config.prepare_on, found.files, with_ray=ray_map is not None)
    temporary = beside(target)
    make_folder(temporary, config.access)
    work, held = temporary.with_suffix(".work"), _clear_and_hold(target, temporary.with_suffix(".lock"))
    try:
        with writing(target):  # names the place in the message about a full disk
            if found.format == "preferences":
                body = _preferences(found, config, temporary)
            elif found.format in BENCHMARKS:
                body = vars(prepare_windows(found, config, temporary)) | {"tie_share": 0.0}
            else:
                body = _sequences(found, config, temporary, work, place, ray_map, sizes or Sizes())
            for path, state in zip(found.files, before, strict=True):
                if _state(path) != state:
                    raise UserError(f"{path} changed while it was read; run the same command again when nobody writes to it.")
            manifest = Manifest(**head, **body)
            manifest.save(temporary)
            return _publish(temporary, target, manifest, config.num_shards)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.with_suffix(".lock").unlink(missing_ok=True)
        if held is not None:
            os.close(held)


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


def _state(path: Path) -> tuple[int, ...] | None:
    """Values that change when a file is written or replaced; None if the file is gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _preferences(found: FileSet, config: DataConfig, folder: Path) -> dict[str, Any]:
    """Writes preference rows into `folder` and returns the manifest's fields about them."""
    check_settings(config)
    rows = prepare_preferences(found.files[0], config, folder)
    return {
        "cuts": {},
        "counts": rows.counts,
        "bad_rows": rows.bad_rows,
        "tie_share": 0.0,
        "notes": rows.notes,
        "items": None,
        "splits": rows.splits,
        "kind": PREFERENCES,
    }


def _sequences(
    found: FileSet,
    config: DataConfig,
    folder: Path,
    work: Path,
    place: str,
    ray_map: Callable[[], Map] | None,
    sizes: Sizes,
) -> dict[str, Any]:
    """Writes items and shards of users into `folder` and returns the manifest's fields about them."""
    opened = open_source(found, config.columns, clean_text=config.clean_text)
    if place == "memory":
        prepared = prepare_in_memory(opened, config, folder)
    else:
        shutil.rmtree(work, ignore_errors=True)
        make_folder(work, "owner")
        run_map: Map = ray_map() if place == "ray" and ray_map is not None else map
        prepared = prepare_blockwise(opened, config, folder, work, run_map, sizes)
    return {
        "cuts": prepared.cuts,
        "counts": prepared.counts.for_manifest(),
        "bad_rows": prepared.bad_rows,
        "tie_share": prepared.counts.tie_share,
        "notes": prepared.notes,
        "items": prepared.items,
        "splits": prepared.splits,
    }


def choose_place(prepare_on: str, files: list[Path], *, with_ray: bool) -> str:
    """Where to do the work: memory, disk or ray, as data.prepare_on says; auto decides by the size of the files."""
    if prepare_on == "ray" and not with_ray:
        raise UserError("data.prepare_on=ray works only from the command line; set data.prepare_on=disk.")
    if prepare_on != "auto":
        return prepare_on
    size = sum(path.stat().st_size * (1 if packing(path) is None else _PACKED_RATIO) for path in files)
    if size < LARGE_BYTES:
        return "memory"
    return "ray" if with_ray else "disk"


def _settings(config: DataConfig, found: FileSet) -> dict[str, object]:
    """The settings that shape the result. Paths, the place of the work and max_bad_rows do not.

    A key of _LATER counts only when it is set, so that data sets from before it existed stay valid.
    """
    settings = config.model_dump(exclude={"source", "path", "max_bad_rows", "prepare_on", "cache_dir", "cache_bytes", "access"})
    for name in _LATER:
        if settings[name] == DataConfig.model_fields[name].get_default(call_default_factory=True):
            del settings[name]
    return {**settings, "format": found.format}


def _existing(target: Path, mark: str, num_shards: int) -> Manifest | None:
    """The manifest at `target` if it is exactly this data set; None if nothing is there. Raises UserError otherwise."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / MANIFEST_NAME).is_file():
        raise UserError(f"data.path ({target}) exists and is not a prepared data set; choose another data.path.")
    manifest = Manifest.load(target)
    if manifest.fingerprint != mark:
        raise UserError(
            f"data.path ({target}) holds a data set of other settings or files "
            f"(fingerprint {manifest.fingerprint}, not {mark}); choose another data.path or remove that folder."
        )
    if problems := folder_faults(Location(target), manifest):
        raise UserError(f"data.path ({target}) is damaged: {problems[0]}; remove the folder and prepare again.")
    found = len(manifest.splits["train"].shards)
    if found != num_shards:
        raise UserError(
            f"data.path ({target}) holds this data set in {found} shards per split, and data.num_shards is {num_shards}; "
            "choose another data.path or remove that folder."
        )
    return manifest


def _publish(temporary: Path, target: Path, manifest: Manifest, num_shards: int) -> Manifest:
    try:
        put_in_place(temporary, target, replace=False)
    except OSError:
        kept = _existing(target, manifest.fingerprint, num_shards)  # another process may have prepared it meanwhile
        if kept is None:
            raise
        return kept
    if manifest.kind == PREFERENCES:
        logger.info(f"prepared {target}: {manifest.counts['rows']} preference rows, fingerprint {manifest.fingerprint}")
        return manifest
    for name in SPLITS:
        logger.info(f"{name}: {manifest.splits[name].rows} users, {manifest.splits[name].targets} targets")
    logger.info(f"prepared {target}: {manifest.counts['items']} items, fingerprint {manifest.fingerprint}")
    return manifest
