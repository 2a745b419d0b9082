"""A finished run as a part of another one: its configuration, and its model folder."""

from dataclasses import dataclass
from pathlib import Path

from rec_dist.config.load import load_saved
from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.methods.method import Ranker
from rec_dist.methods.registry import method_of
from rec_dist.runtime.run_directory import RunDirectory


@dataclass(frozen=True)
class FinishedRun:
    """config: as the run was trained. folder: its model folder."""

    config: RunConfig
    folder: Path

    @property
    def ranker(self) -> Ranker:
        """How the run ranks."""
        return method_of(self.config).ranker

    def on(self, now: RunConfig) -> RunConfig:
        """The run's configuration on the data, questions and cluster of another. Its scores are corrected as its own says.

        Raises UserError if the run would choose its correction on the validation split.
        """
        own = self.config.evaluate
        if "valid" in (own.title_prior, own.length_power):
            raise UserError(
                f"{self.folder} belongs to a run with evaluate.title_prior or evaluate.length_power=valid; train it with the values "
                "that `rec-dist evaluate` chose"
            )
        evaluate = now.evaluate.model_copy(update={"title_prior": own.title_prior, "length_power": own.length_power})
        return self.config.model_copy(update={"data": now.data, "evaluate": evaluate, "cluster": now.cluster})


def open_finished(key: str, folder: Path) -> FinishedRun:
    """The run in `folder`. key: of the configuration, which names it. Raises UserError if it is missing or not finished."""
    run = RunDirectory(folder)
    if not run.config_path.is_file():
        raise UserError(f"{key} ({folder}) is no run directory (config.yaml is missing); give one that `rec-dist train` wrote")
    if run.finished() is None:
        raise UserError(f"{key} ({folder}) is not finished; run `rec-dist train` on it to the end")
    return FinishedRun(saved_config(run.config_path), run.model)


def saved_config(path: Path) -> RunConfig:
    """The configuration of a run that a command takes along. The command's own sections replace those that it does not read."""
    way_out = "train that run again with the text itself in its configuration"
    return load_saved(path, unread=("data", "evaluate", "cluster", "train"), way_out=way_out)
