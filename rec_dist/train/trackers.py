"""Where metrics go besides metrics.jsonl. The only file that imports a tracker; with none chosen, a null object."""

from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Takes rows as metrics.jsonl has them."""

    def log(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class NullTracker:
    """Tracks nothing."""

    def log(self, row: dict[str, Any]) -> None:
        """Forgets the row."""

    def close(self) -> None:
        """Nothing to close."""


class TensorBoardTracker:
    """Scalars into `folder`, one a number of the row."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(logdir=str(folder))

    def log(self, row: dict[str, Any]) -> None:
        """Writes every number of the row under its name at its step."""
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._writer.add_scalar(f"train/{name}", value, row.get("step", 0))

    def close(self) -> None:
        """Flushes to disk."""
        self._writer.close()


def build_tracker(folder: Path, *, tensorboard: bool) -> Tracker:
    """The tracker of this run."""
    return TensorBoardTracker(folder) if tensorboard else NullTracker()
