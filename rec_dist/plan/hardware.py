"""A cluster as the formulas see it, and the time of a collective on it. Plain numbers; this module measures nothing.

Rates are bytes a second in one direction. A device is a GPU, or the cores of a
worker on clusters without GPUs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """`workers` devices of a cluster, which fill node after node.

    memory, reserved: bytes of a device, and the part of them that CUDA and NCCL take.
    flops: achievable FLOP/s of a device in the run's dtype.
    device_rate: from each device to its node; network_rate: from a whole node to the others; both as achieved.
    latencies: seconds a hop.
    """

    memory: float
    reserved: float
    flops: float
    device_rate: float
    network_rate: float
    device_latency: float
    network_latency: float
    per_node: int
    workers: int

    @property
    def nodes(self) -> int:
        """Nodes that hold workers."""
        return -(-self.workers // self.per_node)

    @property
    def link(self) -> tuple[float, str]:
        """(rate, name) of the slowest link in a ring over all workers, which leaves every node once, through all its adapters."""
        if self.nodes > 1 and self.network_rate < self.device_rate:
            return self.network_rate, "network"
        return self.device_rate, "node"


def ring_seconds(size: float, hardware: Hardware, *, collectives: int = 1) -> float:
    """Seconds to gather `size` bytes onto every worker from equal shares, or to scatter their sum, in `collectives` calls.

        (W - 1) / W * size / slowest link  +  calls * (hops within nodes * their latency + hops between nodes * theirs)

    W workers form one ring. Each passes on everything but its own share. All links work at once, so the slowest one counts, and
    the first byte takes W - 1 hops. 0 for one worker.
    """
    workers = hardware.workers
    if workers == 1:
        return 0.0
    between = hardware.nodes - 1
    latency = (workers - 1 - between) * hardware.device_latency + between * hardware.network_latency
    return (workers - 1) / workers * size / hardware.link[0] + collectives * latency
