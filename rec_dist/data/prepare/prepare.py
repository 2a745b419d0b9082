"""`rec-dist prepare`: turns raw files into a prepared data set.

Small sources are prepared in memory; large ones through files, on this machine or by the processes of a cluster. All ways write
the same bytes. The result is a pure function of the settings and the bytes of the sources, and appears whole or not
at all.
"""

import logging
import shutil
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import PREFERENCES, Manifest
from rec_dist.data.dataset.schema import FORMAT_VERSION
from rec_dist.data.prepare.blockwise.driver import Sizes, prepare_blockwise
from rec_dist.data.prepare.blockwise.scratch import Work, drop_left_over
from rec_dist.data.prepare.in_memory import prepare_in_memory
from rec_dist.data.prepare.jobs import Jobs
from rec_dist.data.prepare.known_sources import found_source
from rec_dist.data.prepare.outcome import Prepared
from rec_dist.data.prepare.preferences import check_settings, prepare_preferences
from rec_dist.data.prepare.target import check_target, existing, publish, staged
from rec_dist.data.prepare.windows import prepare_windows
from rec_dist.data.sources import FileSet, open_source
from rec_dist.data.sources.benchmarks import BENCHMARKS
from rec_dist.data.sources.packed import packing
from rec_dist.errors import UserError
from rec_dist.storage.checksums import describe
from rec_dist.storage.disk import writing
from rec_dist.storage.files import fingerprint, make_folder
from rec_dist.storage.location import Location
from rec_dist.storage.uri import shown

logger = logging.getLogger(__name__)

# With prepare_on=auto, sources of this size or more are prepared on Ray. In memory, 128 MiB of text are about 4 million rows, and
# take 1.3 GB and 8 s; Ray takes 20-30 s to start. A compressed file counts five times its size.
LARGE_BYTES = 1 << 27
_PACKED_RATIO = 5
_LATER = ("category", "train_files", "merge_equal_titles", "clean_text", "cold_items_fraction")


def prepare(
    config: DataConfig,
    *,
    tables: FileSet | None = None,
    ray_jobs: Callable[[], Jobs] | None = None,
    sizes: Sizes | None = None,
) -> Manifest:
    """Writes the prepared data set of `config` to data.path and returns its manifest. Keeps it if it exists already.

    tables: what write_tables made, in place of data.source. ray_jobs: connects to Ray and returns what runs jobs there; None if
    there is no Ray. Raises UserError if sources cannot be read, settings leave a split empty, or data.path holds something else.
    """
    if config.split != "leave_one_out" and config.valid_fraction + config.test_fraction >= 1:
        raise UserError(
            f"data.valid_fraction ({config.valid_fraction}) + data.test_fraction ({config.test_fraction}) leave "
            "nothing to train on; keep their sum below 1."
        )
    if config.split == "global_temporal" and config.test_fraction == 0 and config.format not in BENCHMARKS:
        raise UserError("data.test_fraction=0 leaves no test split, which only data.split=user_ratio can do without; raise it.")
    location = Location(config.path)
    check_target(location)
    with nullcontext(tables) if tables is not None else found_source(config) as found:
        return _prepare(config, found, location, ray_jobs, sizes or Sizes())


def _prepare(
    config: DataConfig, found: FileSet, location: Location, ray_jobs: Callable[[], Jobs] | None, sizes: Sizes
) -> Manifest:
    before: list[object] = _states(found) if found.store is None else list(found.store.before)
    _check_unchanged(found, before)  # not only at the end: copying from a store may take an hour, and the rest more
    sources = [describe(path, 0) for path in found.files]
    settings = _settings(config, found)
    shaping = {
        name: value for name, value in settings.items() if name != "num_shards"
    }  # a run can continue with another number of shards
    mark = fingerprint([FORMAT_VERSION, shaping, [(entry.name, entry.sha256) for entry in sources]])
    kept = existing(location, mark, config.num_shards)
    if kept is not None:
        logger.info(f"{location} is already prepared from these files with these settings (fingerprint {mark}): kept")
        return kept
    head: dict[str, Any] = {"fingerprint": mark, "source": shown(str(config.source)), "settings": settings, "sources": sources}
    place = choose_place(config.prepare_on, found.files, with_ray=ray_jobs is not None)
    with staged(location, config) as made, writing(made if location.is_remote else location.folder):
        if found.format == "preferences":
            body = _preferences(found, config, made)
        elif found.format in BENCHMARKS:
            body = vars(prepare_windows(found, config, made)) | {"tie_share": 0.0}
        elif place == "memory":
            body = _about(prepare_in_memory(open_source(found, config.columns, clean_text=config.clean_text), config, made))
        else:
            jobs = ray_jobs() if place == "ray" and ray_jobs is not None else Jobs(map, one_machine=True)
            body = _about(_blockwise(found, config, made, location, jobs, sizes))
        _check_unchanged(found, before)
        if found.store is not None:
            body["notes"] = [found.store.renamed(note) for note in body["notes"]]
        manifest = Manifest(**head, **body)
        manifest.save(made)
        return publish(location, made, manifest, config.num_shards)


def _check_unchanged(found: FileSet, before: list[object]) -> None:
    for path, state, now in zip(found.files, before, _states(found), strict=True):
        if now != state:
            raise UserError(f"{path} changed while it was read; run the same command again when nobody writes to it.")


def _states(found: FileSet) -> list[object]:
    """For each file, values that change when it is written or replaced; None if it is gone."""
    if found.store is None:
        return [_state(path) for path in found.files]
    location = Location(found.store.uri, key="data.source")
    return [location.stored(found.store.name(path)) for path in found.files]


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


def _blockwise(found: FileSet, config: DataConfig, made: Path, location: Location, jobs: Jobs, sizes: Sizes) -> Prepared:
    """Prepares through files: in a folder beside `made`, or below the URI of data.path if jobs may run on other machines."""
    opened = open_source(found, config.columns, clean_text=config.clean_text)
    if location.is_remote and not jobs.one_machine:
        drop_left_over(config.path)
        work = Work(config.path, uuid.uuid4().hex)
        try:
            return prepare_blockwise(opened, config, made, work, jobs.run, sizes)
        finally:
            work.remove()
    folder = made.with_suffix(".work")
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder, "owner")
    return prepare_blockwise(opened, config, made, Work(str(folder), uuid.uuid4().hex), jobs.run, sizes)


def _about(prepared: Prepared) -> dict[str, Any]:
    """The manifest's fields about items and shards of users."""
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
