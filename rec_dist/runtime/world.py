"""This process's place among the workers: a small frozen value that is passed down, so that no layer has to ask a library."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """One worker's place: rank in 0..size-1, local_rank on its node, device as torch names it ("cpu", "cuda:0").

    node: the launcher's name for the machine; empty for a worker that runs in the driver.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    node: str = ""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone writes the shared files of a run."""
        return self.rank == 0
