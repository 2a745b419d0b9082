"""Asks the nodes of a Ray cluster what model.dtype=auto stands for. Cost: a task on each node, which imports torch there."""

from rec_dist.config.schema import ClusterConfig
from rec_dist.errors import UserError
from rec_dist.launch import ray_cluster
from rec_dist.models.precision import ON_GPUS, Choice, choose_on_cpu

_ANSWER_SECONDS = 120.0


def choose_on_nodes(cluster: ClusterConfig) -> Choice:
    """bfloat16 for GPUs, and for CPUs if every node chooses it: all ranks compute in one dtype, and wait for the slowest.

    Raises UserError if a node does not answer.
    """
    ray_cluster.connect(cluster.address)
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if cluster.use_gpu == "auto" and any(node.get("GPU", 0) for node in ray_cluster.nodes(asked=False)):
        return ON_GPUS
    task = ray.remote(num_cpus=0, max_retries=0)(choose_on_cpu)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
    try:
        choices: list[Choice] = ray.get(
            [task.options(scheduling_strategy=place).remote() for place in places], timeout=_ANSWER_SECONDS
        )
    except (GetTimeoutError, RayError) as fault:
        raise UserError(
            f"model.dtype=auto: a node of the Ray cluster does not say what its CPU multiplies ({type(fault).__name__}); set "
            "model.dtype=float32 or bfloat16"
        ) from fault
    slow = [choice for choice in choices if choice.dtype == "float32"]
    return (slow or choices)[0]
