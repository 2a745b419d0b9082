"""What a job asks its scheduler for, against what its configuration takes: GPUs that are missing or idle are told before the queue."""

from dataclasses import dataclass

from rec_dist.errors import UserError
from rec_dist.submit.job import Job


@dataclass(frozen=True)
class Allocation:
    """`nodes` machines of `gpus` GPUs each; the keys that say so. driver_gpus: the driver's machine is one of them."""

    nodes: int
    gpus: int
    nodes_key: str
    gpus_key: str
    driver_gpus: bool


def check_allocation(job: Job, asked: Allocation) -> str | None:
    """A line for the user where GPUs will idle. Raises UserError where the job would wait in the queue only to be refused, or to
    run without the GPUs it was given."""
    cluster = job.config.cluster
    local, total = cluster.launcher == "local", asked.nodes * asked.gpus
    if not job.needs_gpus:
        return None
    if local and asked.driver_gpus and asked.nodes > 1:
        raise UserError(
            f"cluster.launcher=local runs in one process, and {asked.nodes_key} is {asked.nodes}; set cluster.launcher=ray, or "
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
            f"cluster.use_gpu=true, and {asked.gpus_key} is 0; set {asked.gpus_key} to what each has, or cluster.use_gpu=false"
        )
    wanted = 1 if local else cluster.num_workers
    if wanted == "auto" or wanted == total:
        return None
    if wanted > total:
        raise UserError(
            f"cluster.num_workers ({wanted}) is more than the {total} GPU(s) of {asked.nodes_key} ({asked.nodes}) with "
            f"{asked.gpus_key} ({asked.gpus}); make them fit"
        )
    return (
        f"note: {asked.nodes_key} ({asked.nodes}) with {asked.gpus_key} ({asked.gpus}) asks for {total} GPUs, and {wanted} are used "
        "(cluster.num_workers); the others idle"
    )
