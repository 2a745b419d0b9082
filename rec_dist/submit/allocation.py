"""Compares the GPUs that a job requests with those that its configuration uses, before the job waits in a queue."""

from dataclasses import dataclass

from rec_dist.errors import UserError
from rec_dist.submit.job import Job


@dataclass(frozen=True)
class Allocation:
    """`nodes` machines of `gpus` GPUs each, and the keys that say so. driver_gpus: whether the driver runs on one of them."""

    nodes: int
    gpus: int
    nodes_key: str
    gpus_key: str
    driver_gpus: bool


def check_allocation(job: Job, asked: Allocation) -> str | None:
    """A note for the user if GPUs will idle.

    Raises UserError if the job would wait in the queue only to fail, or would run without the GPUs that it was given.
    """
    cluster = job.config.cluster
    local = cluster.launcher == "local" and job.submit.command != "serve"  # whose replicas are workers, whatever trained
    total = asked.nodes * asked.gpus
    if not job.needs_gpus:
        return None
    if local and asked.driver_gpus and asked.nodes > 1:
        raise UserError(
            f"cluster.launcher=local runs in one process, but {asked.nodes_key} is {asked.nodes}; set cluster.launcher=ray, or "
            f"{asked.nodes_key}=1"
        )
    if cluster.use_gpu is False or (cluster.use_gpu == "auto" and not total):
        return None
    if local and not asked.driver_gpus:
        raise UserError(
            "cluster.launcher=local runs in the driver, whose pod has no GPU; set cluster.launcher=ray, or cluster.use_gpu=false"
        )
    if not total:
        raise UserError(
            f"cluster.use_gpu=true, but {asked.gpus_key} is 0; set {asked.gpus_key} to the GPUs of each, or cluster.use_gpu=false"
        )
    wanted = 1 if local else cluster.num_workers
    if wanted == "auto" or wanted == total:
        return None
    if wanted > total:
        raise UserError(
            f"cluster.num_workers ({wanted}) is more than the {total} GPU(s) of {asked.nodes_key} ({asked.nodes}) with "
            f"{asked.gpus_key} ({asked.gpus}); lower it, or request more"
        )
    return (
        f"note: {asked.nodes_key} ({asked.nodes}) with {asked.gpus_key} ({asked.gpus}) requests {total} GPUs, and {wanted} are "
        "used (cluster.num_workers); the others idle"
    )
