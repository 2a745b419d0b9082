"""`rec-dist submit`: checks a configuration here and sends it to a Ray cluster, to SLURM or to Kubernetes, or shows what it
would send.

It checks before it sends anything: every key always (with --dry-run only the keys), and when the cluster's storage is visible
from here, everything that `train` checks before it starts a worker.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rec_dist.checkpoint.remote_fetch import KEY, refuse_other
from rec_dist.checkpoint.remote_files import FINISHED
from rec_dist.commands.target import finished_run
from rec_dist.commands.train import check_train
from rec_dist.config.load import load_config
from rec_dist.config.overrides import is_override
from rec_dist.config.references import recorded
from rec_dist.config.schema import ClusterConfig, RunConfig
from rec_dist.config.submit import RayJobConfig
from rec_dist.errors import UserError
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.location import Location
from rec_dist.storage.uri import is_remote
from rec_dist.submit import kuberay, ray_job, slurm
from rec_dist.submit.job import CONFIG_NAME, Job, build_job

logger = logging.getLogger(__name__)

Target = Literal["ray", "slurm", "kuberay"]


def submit(path: Path, overrides: Sequence[str], *, to: Target, dry_run: bool) -> int:
    """Sends the run of a configuration and returns an exit code: with `to` ray that of the run, else 0 once it is sent."""
    config = _load(path, overrides)
    if config.submit.command == "serve" and to != "kuberay":
        raise UserError(
            "submit.command=serve goes with --to kuberay; elsewhere run `rec-dist serve RUN_DIR cluster.address=auto` on the head of "
            "a Ray cluster"
        )
    job = build_job(config, local_paths=to == "slurm")
    if to == "slurm":
        slurm.check(job)
    elif to == "kuberay":
        kuberay.check(job)
    if dry_run:
        print(_shown(job, to), end="")
        logger.info("--dry-run: only the keys have been checked, not the data or the model")
        return 0
    if _nothing_left(job):
        return 0
    if to == "ray":
        return ray_job.send(job)
    if to == "slurm":
        return slurm.send(job)
    return kuberay.send(job)


def follow(submission_id: str, path: Path | None, overrides: Sequence[str]) -> int:
    """Shows a Ray job until it ends; returns its driver's exit code."""
    return ray_job.follow(submission_id, *_cluster(path, overrides))


def stop(submission_id: str, path: Path | None, overrides: Sequence[str]) -> int:
    """Asks a Ray job to save and stop, and waits for it."""
    return ray_job.stop(submission_id, *_cluster(path, overrides))


def _cluster(path: Path | None, overrides: Sequence[str]) -> tuple[RayJobConfig | None, float]:
    """(where the cluster is, cluster.hang_seconds)."""
    if path is None:
        return None, ClusterConfig().hang_seconds
    config = _load(path, overrides)
    return config.submit.ray, config.cluster.hang_seconds


def _load(path: Path, overrides: Sequence[str]) -> RunConfig:
    if is_override(str(path)) and not path.exists():
        key = str(path).partition("=")[0]
        raise UserError(
            f"{key}=... is an override, and no CONFIG stands before it; write `rec-dist submit CONFIG.yaml {key}=...` (--follow "
            "and --stop need neither where RAY_API_SERVER_ADDRESS is set)"
        )
    return load_config(path, overrides)


def _shown(job: Job, to: Target) -> str:
    """Exactly what would be sent."""
    if to == "slurm":
        return slurm.script_of(job)
    if to == "kuberay":
        return kuberay.manifest(job, kuberay.name_of(job))
    parts = ray_job.parts_of(job.submit.ray)
    request = {"address": ray_job.address_of(job.submit.ray), **ray_job.request_of(job), "working_dir": [CONFIG_NAME, *parts]}
    return f"{json.dumps(request, indent=2)}\n\n# {CONFIG_NAME}\n{job.config_text}"


def _nothing_left(job: Job) -> bool:
    """Whether the run is finished, so that there is nothing to train.

    Raises UserError for what the run would refuse, as far as this machine can see.
    """
    if job.submit.command not in ("train", "evaluate", "serve"):
        return False
    if is_remote(job.config.data.path) or not Path(job.config.data.path).is_dir():
        logger.info(
            f"data.path ({job.config.data.path}) is not on this machine's file system, so only the keys have been checked"
        )
        return False
    if job.submit.command != "train":
        finished_run(Path(job.run_dir), job.served if job.submit.command == "serve" else job.evaluation[1:])
        return False
    check_train(job.config)
    done, remote = RunDirectory(Path(job.run_dir)).finished(), job.config.checkpoint.remote
    if done is not None:
        logger.info(f"{job.run_dir} is finished ({done['step']} steps); nothing to do")
    elif remote is not None and _is_finished(job, Location(remote, key=KEY)):
        logger.info("checkpoint.remote holds the finished run; nothing to do")
        return True
    return done is not None


def _is_finished(job: Job, place: Location) -> bool:
    """Whether a finished copy of this run is there, as far as this machine can see. Raises UserError for another run's copy."""
    try:
        there = place.read(FINISHED) is not None
    except UserError:
        return False
    if there:
        refuse_other(place, recorded(job.config)[0])
    return there
