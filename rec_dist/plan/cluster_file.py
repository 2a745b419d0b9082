"""The cluster files that `rec-dist plan` reads (configs/plan/clusters/*.yaml). Unknown keys are rejected."""

from pathlib import Path

from pydantic import Field

from rec_dist.config.compose import load_mapping
from rec_dist.config.load import validate
from rec_dist.config.section import Section
from rec_dist.config.shipped import existing_or_shipped
from rec_dist.errors import UserError

_LEAST, _MOST = 1e-6, 1e6  # GB, TFLOP/s, GB/s, microseconds, shares: beyond these, products overflow a float
_NODES, _DEVICES = 100_000, 1024


class ClusterFile(Section):
    """Nodes of equal devices. Rates are in GB/s (1e9 bytes), in one direction."""

    name: str = Field(description="Shown above the plan.")
    device: str = Field(description="Name of a device, such as NVIDIA H100 SXM.")
    gpu: bool = Field(True, description="false: the workers run on CPUs.")
    nodes: int = Field(ge=1, le=_NODES, description="Nodes.")
    gpus_per_node: int = Field(ge=1, le=_DEVICES, description="Devices a node; on CPUs, workers a machine.")
    device_memory_gb: float = Field(ge=_LEAST, le=_MOST, description="Memory of a device, GB (1e9 bytes), as torch reports it.")
    reserved_gb: float = Field(
        ge=0, le=_MOST, description="Part of it that CUDA's context, NCCL and cuBLAS take, beside torch's tensors."
    )
    bf16_tflops: float = Field(
        ge=_LEAST,
        le=_MOST,
        description="Peak of dense bfloat16, TFLOP/s. On CPUs model.dtype=auto is bfloat16 if this is above fp32_tflops.",
    )
    fp32_tflops: float = Field(ge=_LEAST, le=_MOST, description="Peak of float32, TFLOP/s.")
    achievable_fraction: float = Field(ge=_LEAST, le=1, description="Share of the peak that forward and backward passes reach.")
    achievable_source: str = Field(min_length=1, description="Source of that share.")
    nvlink_gb_per_second: float = Field(
        ge=_LEAST, le=_MOST, description="From each device (on CPUs, each worker) to the others of its node."
    )
    network_gb_per_second: float = Field(ge=_LEAST, le=_MOST, description="From a node to the others, all its adapters together.")
    link_efficiency: float = Field(ge=_LEAST, le=1, description="Share of these rates that collectives reach.")
    nvlink_latency_us: float = Field(ge=0, le=_MOST, description="A hop between devices of a node, microseconds.")
    network_latency_us: float = Field(ge=0, le=_MOST, description="A hop between nodes, microseconds.")

    @property
    def num_devices(self) -> int:
        """The devices of all nodes."""
        return self.nodes * self.gpus_per_node


def load_cluster(path: Path) -> ClusterFile:
    """A cluster file, or a shipped one by its name. Raises UserError that names every fault."""
    path = existing_or_shipped(str(path), "plan.cluster", "plan/clusters", ".yaml")
    if not path.is_file():
        raise UserError(
            f"plan.cluster ({path}) does not exist; give a cluster file, or the name of a shipped one, such as 8xh100"
        )
    return validate(load_mapping(path), ClusterFile, str(path))
