"""Settles model.dtype=auto before workers start: bfloat16 on GPUs, and on CPUs what suits the CPUs of the workers."""

from rec_dist.config.schema import ClusterConfig
from rec_dist.launch.ray_cluster import address_of
from rec_dist.launch.sizing import has_gpu_here
from rec_dist.models.precision import ON_GPUS, Choice, bfloat16_instructions, choose_on_cpu


def choose_dtype(cluster: ClusterConfig) -> Choice:
    """What model.dtype=auto stands for on the workers of `cluster`.

    Joins a Ray cluster at an address and asks each of its nodes, unless cluster.use_gpu says that workers have GPUs. Otherwise
    workers run on this machine, and Ray need not run yet.
    """
    if cluster.use_gpu is True:
        return ON_GPUS
    if not _runs_here(cluster):
        from rec_dist.launch.dtype_on_ray import choose_on_nodes

        return choose_on_nodes(cluster)
    return ON_GPUS if has_gpu_here(cluster) else choose_on_cpu()


def why_slow(cluster: ClusterConfig, dtype: str) -> str | None:
    """What makes `dtype` slow on the workers of `cluster`, if they run on this machine; None if nothing does."""
    if dtype != "bfloat16" or not _runs_here(cluster) or has_gpu_here(cluster) or bfloat16_instructions() is not None:
        return None
    return "this CPU has no instructions for bfloat16, in which it multiplies about 90 times slower than in float32"


def _runs_here(cluster: ClusterConfig) -> bool:
    return cluster.launcher == "local" or address_of(cluster.address) is None
