"""Who this process is among its peers: a small frozen value that is passed down, so that no floor asks a library."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """One worker's place: rank in 0..size-1, local_rank on its node, device as torch names it ("cpu", "cuda:0").

    node: what the launcher calls the machine; empty where it runs in the driver itself.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    node: str = ""

    @property
    def is_main(self) -> bool:
        """True on the one worker that writes what the run shares."""
        return self.rank == 0
