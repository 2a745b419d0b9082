"""A training run as the Python API shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.config.load import ALL_SECTIONS, load_saved
from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.uri import expanded


@dataclass(frozen=True)
class Run:
    """A training run: its directory, and what lies there.

    path: the run directory (train.run_dir), absolute. config: the whole configuration, with every default.

    >>> Run.open("runs/quickstart/sdpo").metrics("step")[-1]["loss"]  # doctest: +SKIP
    1.0986
    """

    path: Path
    config: RunConfig

    @staticmethod
    def open(path: str | Path) -> "Run":
        """The run in the directory `path`, finished or not. Raises UserError when no run lies there."""
        folder = expanded(path).absolute()
        run = RunDirectory(folder)
        if not run.config_path.is_file():
            raise UserError(f"{path} is no run directory (config.yaml is missing); give the train.run_dir of a run")
        return Run(folder, load_saved(run.config_path, unread=ALL_SECTIONS))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return RunDirectory(self.path).finished() is not None

    @property
    def model_path(self) -> Path:
        """The folder of the trained model: an adapter, or a whole model. Raises UserError before the run has finished."""
        if not self.finished:
            raise UserError(f"{self.path} is not finished, so it has no model yet; train it to the end")
        return RunDirectory(self.path).model

    def metrics(self, event: str | None = None) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, in the order in which they were written.

        event: only rows of this kind: "step" (loss, grad_norm, tokens_per_second, step_seconds, ...), "validation", "checkpoint",
        "evaluation". docs/metrics.md lists all kinds with their keys and units.
        """
        return [row for row in RunDirectory(self.path).rows() if event is None or row.get("event") == event]
