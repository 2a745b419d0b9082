"""The memory of a device: a GPU's, or on CPUs that of the host, which its workers share."""

import os
import socket
from collections import Counter
from pathlib import Path

import torch

from rec_dist.runtime import collectives

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def total_bytes(device: str) -> int:
    """Bytes that the device has; on a CPU, those of the machine or of this process's container, which all its workers share."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP_LIMIT.read_text(encoding="utf-8").strip() if _CGROUP_LIMIT.is_file() else "max"
    return machine if limit == "max" else min(machine, int(limit))


def smallest_share(device: str) -> float:
    """The fewest bytes that any worker has for itself: its GPU's, or an equal share of its host's. A collective."""
    found: list[tuple[str, int]] = collectives.gather((socket.gethostname(), total_bytes(device)))
    if device.startswith("cuda"):
        return float(min(size for _, size in found))
    workers = Counter(host for host, _ in found)
    return min(size / workers[host] for host, size in found)
