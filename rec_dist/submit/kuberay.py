"""A run as a RayJob of the KubeRay operator, or a finished one behind HTTP as a RayService: the manifest
(launchers/kuberay.yaml.j2), and `kubectl create` or `apply`.

The field names are those of KubeRay's API reference, ray.io/v1 (docs/reference/api.md of the KubeRay project). The head pod runs
the driver and no worker. Every retry is a new cluster on the same volume, so the run resumes from its newest checkpoint. A
RayService keeps its name, so that a changed one takes the place of the one that serves.
"""

import json
import logging
import math
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from rec_dist.errors import UserError
from rec_dist.storage.uri import is_remote
from rec_dist.submit.allocation import Allocation, check_allocation
from rec_dist.submit.job import CONFIG_NAME, Job
from rec_dist.submit.templates import render

logger = logging.getLogger(__name__)

_CONFIG_FOLDER = "/etc/rec-dist"  # as in the template
_OLDEST_RAY = (2, 52)  # the first with tokens
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # KubeRay appends to it, and a Service's name has at most 63 characters
_TOKEN_VARIABLE = "REC_DIST_SERVE_TOKEN"  # as in the template
_MARGIN_SECONDS = 30  # beyond the deadline of a request


def check(job: Job) -> None:
    """Raises UserError for what the cluster would reject, as far as the configuration shows it."""
    settings = job.submit.kuberay
    if job.submit.storage is None:
        raise UserError("submit.storage is not set; give the folder at which pods mount submit.kuberay.claim, such as /shared")
    if not _NAME.fullmatch(name := name_of(job)):
        raise UserError(
            f"{name} cannot be the name of a {_kind(job)} (submit.kuberay.job_name, else made of submit.name); choose one of at most "
            "47 characters of a-z, 0-9 and -, starting with a letter"
        )
    given = settings.ray_version
    if given is not None and tuple(map(int, re.findall(r"\d+", given)[:2])) < _OLDEST_RAY:
        raise UserError(
            f"submit.kuberay.ray_version ({given}) is older than 2.52, the first Ray with tokens; without one, any pod could run "
            "code in the cluster. Use an image with a newer Ray"
        )
    nodes, gpus = "submit.kuberay.workers", "submit.kuberay.gpus_per_worker"
    note = check_allocation(job, Allocation(settings.workers, settings.gpus_per_worker, nodes, gpus, driver_gpus=False))
    if _serves(job):
        _check_served(job)
    if note is not None:
        logger.info(note)
    if settings.template is None:
        for key, path in _outside(job, job.submit.storage).items():
            logger.info(
                f"note: {key} ({path}) is outside submit.storage ({job.submit.storage}), the only folder that pods share; put it "
                "there, or into the image"
            )


def _outside(job: Job, storage: str) -> dict[str, str]:
    """The run directory and the data set, if they are folders of the pod itself and not of the claim."""
    found = {"train.run_dir": job.run_dir, "data.path": job.config.data.path}
    return {key: path for key, path in found.items() if not (is_remote(path) or PurePosixPath(path).is_relative_to(storage))}


def _check_served(job: Job) -> None:
    settings = job.submit.kuberay
    if settings.token_secret is None:
        raise UserError(
            "submit.kuberay.token_secret is not set, so every pod could ask for users' lists; name a Secret, made with `kubectl -n "
            f"{shlex.quote(settings.namespace)} create secret generic NAME --from-literal={_TOKEN_VARIABLE}=$(openssl rand -hex 32)`"
        )
    if _TOKEN_VARIABLE in job.submit.env:
        raise UserError(
            f"submit.env.{_TOKEN_VARIABLE} would stand in the manifest; remove it, and name its Secret in submit.kuberay.token_secret"
        )
    if settings.suspend:
        raise UserError("submit.kuberay.suspend is for a RayJob, and submit.command=serve makes a RayService; remove it")
    _replicas(job)


def name_of(job: Job) -> str:
    """The name of the RayJob and its ConfigMap, or of the RayService."""
    return job.submit.kuberay.job_name or (job.name if _serves(job) else job.stamped_name())


def _serves(job: Job) -> bool:
    return job.submit.command == "serve"


def _kind(job: Job) -> str:
    return "RayService" if _serves(job) else "RayJob"


def manifest(job: Job, name: str) -> str:
    """A ConfigMap with the configuration and the RayJob, or the RayService."""
    settings = job.submit.kuberay
    values = {
        "name": name,
        "kuberay": settings,
        "storage": job.submit.storage,
        "env": job.written_env(lambda name: f"put {name} into a Secret, and name that in submit.kuberay.env_from_secret"),
        "needs_gpus": job.needs_gpus,
        "served": _served(job) if _serves(job) else None,
        "grace_seconds": math.ceil(job.submit.serve.deadline_seconds) + _MARGIN_SECONDS if _serves(job) else job.grace_seconds,
        "entrypoint": shlex.join(job.words(f"{_CONFIG_FOLDER}/{CONFIG_NAME}")),
        "ray_version": settings.ray_version or version("ray"),
        "config": job.config_text.rstrip("\n"),
    }
    return render("kuberay.yaml.j2", settings.template, "submit.kuberay.template", values)


def _served(job: Job) -> dict[str, Any]:
    """What the RayService serves, and with which replicas. Each is one server, which holds its scorer."""
    number, cpus, use_gpu = _replicas(job)
    here = ("cluster.launcher=local", "cluster.num_workers=1", f"cluster.use_gpu={json.dumps(use_gpu)}")
    options = job.submit.serve
    return {
        "arguments": {"run": job.run_dir, "overrides": [*job.served, *here], "options": options.model_dump()},
        "replicas": number,
        "actor": {"num_cpus": cpus, "num_gpus": int(use_gpu)},
        "request_seconds": options.deadline_seconds + _MARGIN_SECONDS / 2,  # of Ray Serve, while no replica takes the request
    }


def _replicas(job: Job) -> tuple[int, float, bool]:
    """(replicas, CPUs of each, whether each has a GPU): one for each GPU, or without GPUs one for each worker pod.

    Raises UserError if they do not fit into the worker pods, or leave one without a replica: it would never be ready.
    """
    cluster, settings = job.config.cluster, job.submit.kuberay
    gpus = 0 if cluster.use_gpu is False else settings.gpus_per_worker
    number = settings.workers * max(gpus, 1) if cluster.num_workers == "auto" else cluster.num_workers
    of_pod = math.ceil(number / settings.workers)
    cpus = settings.cpus_per_worker // of_pod if cluster.cpus_per_worker == "auto" else cluster.cpus_per_worker
    if not 0 < cpus * of_pod <= settings.cpus_per_worker:
        raise UserError(
            f"cluster.num_workers ({number}) replicas with cluster.cpus_per_worker ({cluster.cpus_per_worker}) do not fit into "
            f"submit.kuberay.workers ({settings.workers}) pods with submit.kuberay.cpus_per_worker ({settings.cpus_per_worker}); "
            "lower the former or raise the latter"
        )
    if number < settings.workers:
        raise UserError(
            f"submit.kuberay.workers ({settings.workers}) is more than cluster.num_workers ({number}), and a pod without a replica "
            "never gets ready; lower it"
        )
    return number, cpus, gpus > 0


def send(job: Job) -> int:
    """Passes the manifest to kubectl and returns 0; what it describes then runs on its own."""
    name, kubectl, kind = name_of(job), ["kubectl", "-n", job.submit.kuberay.namespace], _kind(job).lower()
    how = "apply" if _serves(job) else "create"
    limit = job.config.cluster.hang_seconds or None
    try:
        done = subprocess.run([*kubectl, how, "-f", "-"], input=manifest(job, name), text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"kubectl did not answer within {limit:g} s (cluster.hang_seconds), and may have created {name}: look with "
            f"`{shlex.join(kubectl)} get {kind} {name}` before you submit again"
        ) from None
    except FileNotFoundError:
        raise UserError(
            f"kubectl is not installed here; save the manifest with --dry-run and {how} it where kubectl is"
        ) from None
    if done.returncode:
        raise UserError(f"kubectl refused the manifest (exit code {done.returncode}); its message is above")
    command = shlex.join(kubectl)
    state = f"its state: {command} get {kind} {name}   remove it: {command} delete {kind}/{name}"
    if _serves(job):
        logger.info(f"ask it, once it is ready: {command} port-forward service/{name}-serve-svc 8000   {state}")
    else:
        logger.info(f"follow it: {command} logs -f job/{name}   {state} cm/{name}")
    return 0
