"""`rec-dist embed`: runs every item of the catalogue through a base or tuned language model, into a folder of vectors.

Recommenders start from these vectors. Parts are written one by one and kept: after a stop or a kill the same command computes the
missing ones. With cluster.launcher=ray, Ray Data actors share the parts and write into the same folder.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rec_dist.commands.dtype import dtype_in, settle_dtype
from rec_dist.commands.progress import watching
from rec_dist.commands.target import read_target
from rec_dist.config.paths import absolute
from rec_dist.config.schema import ClusterConfig
from rec_dist.data.artifacts.embeddings import EMBEDDED_NAME, check_files, holds_other_files, read_manifest, sweep
from rec_dist.errors import UserError
from rec_dist.launch.workers import local_device
from rec_dist.methods.language_model.embedding import Embedder, EmbedJob, ItemPrompts
from rec_dist.methods.registry import check_workers_find, method_of
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.disk import writing
from rec_dist.storage.files import lock, make_folder
from rec_dist.storage.outputs import check_output

logger = logging.getLogger(__name__)

_LOG_NAMES = ("log.txt", "progress.json", "progress.tmp")  # a killed process may leave the last


def embed(target: Path, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Writes embeddings of all items into `folder`, unless it holds them already, and returns embeddings.json.

    target: a finished run directory, or a CONFIG for its base model.
    Raises UserError for a target that cannot embed, and for a folder that holds anything else.
    """
    folder = absolute(str(folder))
    check_output(folder, "FOLDER", folder=True, may_exist=True)
    if holds_other_files(folder, _LOG_NAMES):
        raise UserError(f"{folder} is not empty and holds no item embeddings; name another folder")
    job = _job(target, folder, overrides)
    prompts, config = ItemPrompts(job), job.parsed()
    with _locked(folder):
        done = _finished(folder, prompts)
        if done is not None:
            sweep(folder, _LOG_NAMES)
            logger.info(f"{folder} is embedded already; nothing to do")
            return done
        job.initial.check_model()
        missing = [part for part in range(len(prompts.parts)) if not prompts.parts.is_current(part)]
        kept = len(prompts.parts) - len(missing)
        if kept:
            logger.info(f"{kept} of {len(prompts.parts)} parts are there already")
        began, run = time.perf_counter(), RunDirectory(folder)
        with watching(run, hang_seconds=config.cluster.hang_seconds), writing(folder):
            for number, _ in enumerate(_write(job, missing, config.cluster), start=1):
                run.progress("embed", kept + number, len(prompts.parts))
        facts = {"inputs": prompts.inputs, "model": str(job.initial.model), "source": str(job.saved or target)}
        cost = {"tokens": prompts.num_tokens, "seconds": round(time.perf_counter() - began, 3), "parts_kept": kept}
        prompts.parts.join({**facts, **cost})
        sweep(folder, _LOG_NAMES)
        value = read_manifest(folder)
        assert value is not None
        logger.info(f"{value['num_items']:,} items of width {value['width']} in {folder}")
        return value


def _job(target: Path, folder: Path, overrides: Sequence[str]) -> EmbedJob:
    config, run = read_target(target, overrides)
    check_workers_find(config)
    manifest = read_manifest(folder)
    config, lines = settle_dtype(config, dtype_in({"model": manifest["inputs"]}) if manifest is not None else None)
    for line in lines:
        logger.info(line)
    return method_of(config).ranker.embed(config, folder, None if run is None else run.model)


def _finished(folder: Path, prompts: ItemPrompts) -> dict[str, Any] | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    old, new = manifest["inputs"], prompts.inputs
    if changed := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        raise UserError(
            f"{folder} holds embeddings of other inputs (different: {', '.join(changed)}); name another folder, or remove it"
        )
    check_files(folder, manifest)
    return manifest


def _write(job: EmbedJob, parts: Sequence[int], cluster: ClusterConfig) -> Iterator[int]:
    """Writes `parts` here or on the workers of a cluster. Yields each part once it is written."""
    if not parts:
        return
    if cluster.launcher == "ray":
        from rec_dist.launch.embed_on_ray import write_parts

        yield from write_parts(job, parts, cluster)
        return
    embedder = Embedder(job, local_device(cluster))
    for part in parts:
        embedder.write(part)
        yield part


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder for this process. Removes it again if this call made it and left it empty."""
    new = not folder.exists()
    try:
        make_folder(folder)
        held = lock(folder / ".lock")
    except BlockingIOError as fault:
        raise UserError(f"{folder} is in use by another process; wait for it or name another folder") from fault
    except OSError as fault:  # a file system without locks
        raise UserError(f"{folder} cannot hold embeddings: {fault}; name another folder") from fault
    try:
        yield
    except UserError:
        if new and not (folder / EMBEDDED_NAME).is_file():
            _take_back(folder)
        raise
    finally:
        os.close(held)


def _take_back(folder: Path) -> None:
    """Removes a folder to which nothing was written."""
    for name in (".lock", *_LOG_NAMES):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
