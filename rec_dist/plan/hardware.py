"""A cluster as the formulas see it, and the time of a collective on it. Plain numbers; nothing is measured here.

Rates are bytes a second in one direction. "Device": a GPU, or a worker where there are none.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """workers devices of a cluster, as many on each node as fit.

    memory, reserved: bytes of a device, and what CUDA and NCCL take of them. flops: achievable FLOP/s of a device in the run's dtype.
    device_rate: of each device to its node; network_rate: of a whole node to others; both as achieved. latencies: seconds a hop.
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
        """Nodes that the workers stand on."""
        return -(-self.workers // self.per_node)

    @property
    def link(self) -> tuple[float, str]:
        """(rate, name) of the slowest link of a ring over all workers: the ring leaves every node once, through all its adapters."""
        if self.nodes > 1 and self.network_rate < self.device_rate:
            return self.network_rate, "network"
        return self.device_rate, "node"


def ring_seconds(size: float, hardware: Hardware, *, collectives: int = 1) -> float:
    """Of gathering `size` bytes onto every worker from equal shares, or scattering their sum, in `collectives` calls.

        (W - 1) / W * size / slowest link  +  calls * (hops within nodes * their latency + hops between nodes * theirs)

    W workers in one ring: each passes on everything but its own share, and all links work at once, so the slowest one counts; a
    first byte takes W - 1 hops. 0 for one worker.
    """
    workers = hardware.workers
    if workers == 1:
        return 0.0
    between = hardware.nodes - 1
    latency = (workers - 1 - between) * hardware.device_latency + between * hardware.network_latency
    return (workers - 1) / workers * size / hardware.link[0] + collectives * latency
