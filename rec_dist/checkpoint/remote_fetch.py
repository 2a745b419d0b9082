"""Fetches a run from its remote copy into the run directory, if the copy is ahead. Checks everything before it changes a file."""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rec_dist.checkpoint.remote_files import CONFIG, FINISHED, drop_damaged, install, newest_step, newest_valid, remove, wanted
from rec_dist.errors import UserError
from rec_dist.runtime.identity import differences
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.disk import writing
from rec_dist.storage.location import Location, NoSuchFileError, Stored

logger = logging.getLogger(__name__)

KEY = "checkpoint.remote"
_FETCHED = ".fetched"


def fetch(place: Location, run: RunDirectory, config: Mapping[str, Any]) -> None:
    """Updates the run directory from its copy if the copy is ahead. This process must hold the run directory.

    Raises UserError and changes nothing if the copy belongs to another configuration, holds other files, or cannot be read.
    """
    files = wanted(place.tree())
    if CONFIG not in files:
        if others := sorted(files):
            raise UserError(f"{KEY} ({place}) holds no run and is not empty ({others[0]}); choose another")
        return
    refuse_other(place, config)
    here, ended = newest_valid(run.checkpoints), run.finished() is not None and any(run.model.glob("*"))
    has_ended = FINISHED in files and any(name.startswith("model/") for name in files)
    if ended or not (has_ended or newest_step(files) > here):
        return
    logger.info(f"{KEY}: fetching the run from {place}")
    began, beside = time.perf_counter(), run.path / _FETCHED
    try:
        with writing(run.path):
            _download(place, files, beside)
            num_bytes = sum(path.stat().st_size for path in beside.rglob("*") if path.is_file())
            for line in drop_damaged(beside, here):
                logger.warning(f"{KEY}: {line}")
            install(beside, run.path)
    finally:
        remove(beside)
    logger.info(f"{KEY}: {num_bytes / 1e6:.1f} MB in {time.perf_counter() - began:.1f} s")


def _download(place: Location, files: Mapping[str, Stored], beside: Path) -> None:
    """Skips files that vanish meanwhile, as old checkpoints of a live run do; the caller drops checkpoints that miss them."""
    remove(beside)
    for name, stored in files.items():
        target = beside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.copy(name, target)
        except NoSuchFileError:
            continue
        os.utime(target, (stored.written, stored.written))


def refuse_other(place: Location, config: Mapping[str, Any]) -> None:
    """Raises UserError if the copy belongs to another configuration, or its configuration cannot be read."""
    try:
        changed = differences(read_object(place, CONFIG), json.loads(json.dumps(config)))
    except (AttributeError, TypeError):
        raise _damaged(place, CONFIG) from None
    if changed:
        raise UserError(
            f"{KEY} ({place}) holds a run of another configuration (different: {', '.join(changed[:6])}); choose another, or "
            "remove what is there"
        )


def read_object(place: Location, name: str) -> dict[str, Any]:
    """Reads a JSON object of the copy; an empty one if there is no such file. Raises UserError if it is damaged or unreadable."""
    text = place.read(name)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(place, name) from None
    if not isinstance(value, dict):
        raise _damaged(place, name)
    return value


def _damaged(place: Location, name: str) -> UserError:
    return UserError(f"{KEY}: {place.name(name)} is damaged; choose another, or remove what is there")
