"""A run as a RayJob of the KubeRay operator: the manifest, and `kubectl apply`.

Field names are those of KubeRay's API reference, ray.io/v1 (docs/reference/api.md of the KubeRay project). The head pod runs the
driver and no worker. Every retry is a new cluster on the same volume, so it goes on from the newest checkpoint.
"""

import logging
import re
import shlex
import subprocess
from importlib.metadata import version
from typing import Any

from rec_dist.config.load import to_plain_yaml
from rec_dist.config.submit import KubeRayConfig
from rec_dist.errors import UserError
from rec_dist.submit.allocation import Allocation, check_allocation
from rec_dist.submit.job import CONFIG_NAME, Job

logger = logging.getLogger(__name__)

_CONFIG_FOLDER = "/etc/rec-dist"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # KubeRay adds to it, and a Service's name ends at 63


def check(job: Job) -> None:
    """Raises UserError for what the job would refuse, as far as the configuration tells."""
    settings = job.submit.kuberay
    if job.submit.storage is None:
        raise UserError("submit.storage is not set; give the folder at which pods mount submit.kuberay.claim, such as /shared")
    if not _NAME.fullmatch(name := name_of(job)):
        raise UserError(
            f"{name} is no name for a RayJob (submit.kuberay.job_name, else submit.name with the time): at most 47 of a-z, 0-9 and -, "
            "a letter first; choose another"
        )
    nodes, gpus = "submit.kuberay.workers", "submit.kuberay.gpus_per_worker"
    note = check_allocation(job, Allocation(settings.workers, settings.gpus_per_worker, nodes, gpus, driver_gpus=False))
    if note is not None:
        logger.info(note)


def name_of(job: Job) -> str:
    """Of the RayJob and its ConfigMap."""
    return job.submit.kuberay.job_name or job.stamped_name()


def manifest(job: Job, name: str) -> str:
    """Two documents: a ConfigMap with the configuration, and the RayJob."""
    settings = job.submit.kuberay
    place = {"name": name, "namespace": settings.namespace}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": place, "data": {CONFIG_NAME: job.config_text}}
    metadata = {**place, **({"labels": settings.labels} if settings.labels else {})}
    ray_job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": _spec(job, settings, name)}
    return "---\n".join(to_plain_yaml(document) for document in (config_map, ray_job))


def send(job: Job) -> int:
    """Hands the manifest to kubectl; the job then runs without us."""
    name, kubectl = name_of(job), ["kubectl", "-n", job.submit.kuberay.namespace]
    try:
        done = subprocess.run([*kubectl, "create", "-f", "-"], input=manifest(job, name), text=True, check=False)
    except FileNotFoundError:
        raise UserError("kubectl is not installed here; write the manifest with --dry-run and apply it where it is") from None
    if done.returncode:
        raise UserError(f"kubectl refused the manifest (exit code {done.returncode}); what it said stands above")
    ask = shlex.join(kubectl)
    logger.info(
        f"follow it: {ask} logs -f job/{name}   its state: {ask} get rayjob {name}   remove it: {ask} delete rayjob/{name} cm/{name}"
    )
    return 0


def _spec(job: Job, settings: KubeRayConfig, name: str) -> dict[str, Any]:
    runtime_env = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(job.grace_seconds)}}
    return {
        "entrypoint": shlex.join(job.words(f"{_CONFIG_FOLDER}/{CONFIG_NAME}")),
        "submissionMode": "K8sJobMode",
        "runtimeEnvYAML": to_plain_yaml(runtime_env),
        "backoffLimit": settings.retries,
        "suspend": settings.suspend,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.ttl_seconds,
        "rayClusterSpec": {
            "rayVersion": settings.ray_version or version("ray"),
            "headGroupSpec": {
                # No CPU and no GPU for workers: the head's death ends the whole job, so it does little.
                "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"},
                "template": {"spec": _head_pod(job, settings, name)},
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": settings.workers,
                    "minReplicas": settings.workers,
                    "maxReplicas": settings.workers,
                    "rayStartParams": {},
                    "template": {"spec": _worker_pod(job, settings)},
                }
            ],
        },
    }


def _head_pod(job: Job, settings: KubeRayConfig, name: str) -> dict[str, Any]:
    pod = _pod(job, settings, "ray-head", {"cpu": str(settings.head_cpus), "memory": settings.head_memory})
    pod["containers"][0]["volumeMounts"].append({"name": "config", "mountPath": _CONFIG_FOLDER})
    pod["volumes"].append({"name": "config", "configMap": {"name": name}})
    return pod


def _worker_pod(job: Job, settings: KubeRayConfig) -> dict[str, Any]:
    resources = {"cpu": str(settings.cpus_per_worker), "memory": settings.memory_per_worker}
    if settings.gpus_per_worker and job.needs_gpus:
        resources[settings.gpu_resource] = str(settings.gpus_per_worker)
    pod = _pod(job, settings, "ray-worker", resources)
    pod["containers"][0]["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
    pod["volumes"].append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}})
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    return pod


def _pod(job: Job, settings: KubeRayConfig, name: str, resources: dict[str, str]) -> dict[str, Any]:
    """What head and workers share: the image, the environment, credentials and the volume with the run directories."""
    secret = settings.env_from_secret
    container = {
        "name": name,
        "image": settings.image,
        "env": [{"name": key, "value": value} for key, value in job.submit.env.items()],
        **({"envFrom": [{"secretRef": {"name": secret}}]} if secret is not None else {}),
        # Requests equal to limits: a pod that is never thrown out for its neighbours' sake.
        "resources": {"limits": dict(resources), "requests": dict(resources)},
        "volumeMounts": [{"name": "storage", "mountPath": job.submit.storage}],
    }
    return {
        **({"serviceAccountName": settings.service_account} if settings.service_account is not None else {}),
        "terminationGracePeriodSeconds": job.grace_seconds,
        "containers": [container],
        "volumes": [{"name": "storage", "persistentVolumeClaim": {"claimName": settings.claim}}],
    }
