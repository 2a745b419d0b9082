"""How many workers fit on a cluster, and how much of a node each gets. Plain numbers, without Ray.

Rejects requests that Ray would otherwise wait on silently, and counts what is left after a node is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rec_dist.config.schema import ClusterConfig
from rec_dist.errors import UserError

Node = dict[str, float]  # what Ray calls its resources: "CPU", "GPU"


@dataclass(frozen=True)
class Size:
    """A group of workers. cpus: of each worker; use_gpu: whether each has one GPU."""

    num_workers: int
    use_gpu: bool
    cpus: float

    def __str__(self) -> str:
        share = "1 GPU" if self.use_gpu else f"{self.cpus:g} CPU"
        return f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''} with {share} each"


def has_gpu_here(cluster: ClusterConfig) -> bool:
    """Whether `cluster` wants GPUs for workers on this machine; for use_gpu=auto, whether torch sees one."""
    import torch

    return torch.cuda.is_available() if cluster.use_gpu == "auto" else cluster.use_gpu


def size_workers(cluster: ClusterConfig, nodes: Sequence[Node]) -> Size:
    """The group that `cluster` asks for, on nodes with these resources. A worker must fit on one node.

    Automatic: a worker for each GPU. Without GPUs, a worker for each node with all its cores, because two workers of a node
    would gather over loopback on the cores that compute. Of uneven nodes each gives as many cores as the smallest has.
    Raises UserError when fewer workers fit, because Ray would wait silently for more nodes.
    """
    cpus, gpus = [node.get("CPU", 0.0) for node in nodes], [int(node.get("GPU", 0)) for node in nodes]
    use_gpu = bool(sum(gpus) > 0 if cluster.use_gpu == "auto" else cluster.use_gpu)
    if use_gpu and not sum(gpus):
        raise UserError("cluster.use_gpu is true but the cluster has no GPU; set cluster.use_gpu=false or auto")
    whole = [int(cpu) for cpu in cpus if cpu >= 1]  # a head that only schedules has no CPUs
    automatic = sum(gpus) if use_gpu else max(len(whole), 1)
    num_workers = automatic if cluster.num_workers == "auto" else cluster.num_workers
    if use_gpu and num_workers > sum(gpus):
        raise UserError(f"cluster.num_workers ({num_workers}) is more than the cluster's {sum(gpus)} GPUs; lower it or add nodes")

    def room(share: float) -> int:
        """Workers that fit with `share` CPUs each."""
        return sum(min(int(cpu // share), gpu if use_gpu else num_workers) for cpu, gpu in zip(cpus, gpus, strict=True))

    most = min(whole, default=0) if cluster.num_workers == "auto" and not use_gpu else int(max(cpus, default=0.0))
    shares = [float(share) for share in range(most, 0, -1)] + ([0.5] if use_gpu else [])
    if cluster.cpus_per_worker != "auto":
        shares = [cluster.cpus_per_worker]
    share = next((share for share in shares if room(share) >= num_workers), None)
    if share is None:
        raise UserError(
            f"cluster.num_workers ({num_workers}) with cluster.cpus_per_worker ({cluster.cpus_per_worker}) needs more CPUs than "
            f"the cluster's {len(nodes)} node(s) have ({sum(cpus):g} in all); lower one of them or add nodes"
        )
    return Size(num_workers, use_gpu, share)


class Elastic:
    """The sizes that a run may have: what is asked for, and down to cluster.min_workers where nodes were lost.

    GPUs or not is settled by the first size: a run does not change its device.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster
        self.wanted: int | None = None  # settled by the first size

    def first(self, nodes: Sequence[Node]) -> Size:
        """The size of the first attempt: the largest that fits, min_workers or more. Raises UserError when not even that fits."""
        size = self._full(nodes) if self._cluster.num_workers == "auto" else self.largest(nodes)
        self.wanted = size.num_workers if self._cluster.num_workers == "auto" else self._cluster.num_workers
        self._cluster = self._cluster.model_copy(update={"use_gpu": size.use_gpu, "num_workers": self.wanted})
        return size

    def largest(self, nodes: Sequence[Node]) -> Size:
        """The most workers that fit, from the wanted number down to min_workers.

        Raises UserError when not even min_workers fit.
        """
        try:
            return self._full(nodes)
        except UserError:
            most = self._cluster.num_workers
            if self._cluster.min_workers is None or most == "auto":
                raise
            for number in range(most - 1, self._cluster.min_workers - 1, -1):
                try:
                    return size_workers(self._cluster.model_copy(update={"num_workers": number}), nodes)
                except UserError:
                    continue
            raise

    def _full(self, nodes: Sequence[Node]) -> Size:
        return size_workers(self._cluster, nodes)
