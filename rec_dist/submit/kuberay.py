"""A run as a RayJob of the KubeRay operator: the manifest (launchers/rayjob.yaml.j2), and `kubectl create`.

The field names are those of KubeRay's API reference, ray.io/v1 (docs/reference/api.md of the KubeRay project). The head pod runs
the driver and no worker. Every retry is a new cluster on the same volume, so the run resumes from its newest checkpoint.
"""

import logging
import re
import shlex
import subprocess
from importlib.metadata import version

from rec_dist.errors import UserError
from rec_dist.submit.allocation import Allocation, check_allocation
from rec_dist.submit.job import CONFIG_NAME, Job
from rec_dist.submit.templates import render

logger = logging.getLogger(__name__)

_CONFIG_FOLDER = "/etc/rec-dist"  # as in the template
_OLDEST_RAY = (2, 52)  # the first with tokens
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # KubeRay appends to it, and a Service's name has at most 63 characters


def check(job: Job) -> None:
    """Raises UserError for what the cluster would reject, as far as the configuration shows it."""
    settings = job.submit.kuberay
    if job.submit.storage is None:
        raise UserError("submit.storage is not set; give the folder at which pods mount submit.kuberay.claim, such as /shared")
    if not _NAME.fullmatch(name := name_of(job)):
        raise UserError(
            f"{name} cannot be the name of a RayJob (submit.kuberay.job_name, else submit.name with the time); choose one of at "
            "most 47 characters of a-z, 0-9 and -, starting with a letter"
        )
    given = settings.ray_version
    if given is not None and tuple(map(int, re.findall(r"\d+", given)[:2])) < _OLDEST_RAY:
        raise UserError(
            f"submit.kuberay.ray_version ({given}) is older than 2.52, the first Ray with tokens; without one, any pod could run "
            "code in the cluster. Use an image with a newer Ray"
        )
    nodes, gpus = "submit.kuberay.workers", "submit.kuberay.gpus_per_worker"
    note = check_allocation(job, Allocation(settings.workers, settings.gpus_per_worker, nodes, gpus, driver_gpus=False))
    if note is not None:
        logger.info(note)


def name_of(job: Job) -> str:
    """The name of the RayJob and its ConfigMap."""
    return job.submit.kuberay.job_name or job.stamped_name()


def manifest(job: Job, name: str) -> str:
    """Two documents: a ConfigMap with the configuration, and the RayJob."""
    settings = job.submit.kuberay
    values = {
        "name": name,
        "kuberay": settings,
        "storage": job.submit.storage,
        "env": job.written_env(lambda name: f"put {name} into a Secret, and name that in submit.kuberay.env_from_secret"),
        "needs_gpus": job.needs_gpus,
        "grace_seconds": job.grace_seconds,
        "entrypoint": shlex.join(job.words(f"{_CONFIG_FOLDER}/{CONFIG_NAME}")),
        "ray_version": settings.ray_version or version("ray"),
        "config": job.config_text.rstrip("\n"),
    }
    return render("rayjob.yaml.j2", settings.template, "submit.kuberay.template", values)


def send(job: Job) -> int:
    """Passes the manifest to kubectl and returns 0; the job then runs on its own."""
    name, kubectl = name_of(job), ["kubectl", "-n", job.submit.kuberay.namespace]
    limit = job.config.cluster.hang_seconds or None
    try:
        done = subprocess.run([*kubectl, "create", "-f", "-"], input=manifest(job, name), text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"kubectl did not answer within {limit:g} s (cluster.hang_seconds), and may have created {name}: look with "
            f"`{shlex.join(kubectl)} get rayjob {name}` before you submit again"
        ) from None
    except FileNotFoundError:
        raise UserError(
            "kubectl is not installed here; save the manifest with --dry-run and create it where kubectl is"
        ) from None
    if done.returncode:
        raise UserError(f"kubectl refused the manifest (exit code {done.returncode}); its message is above")
    command = shlex.join(kubectl)
    logger.info(
        f"follow it: {command} logs -f job/{name}   its state: {command} get rayjob {name}   "
        f"remove it: {command} delete rayjob/{name} cm/{name}"
    )
    return 0
