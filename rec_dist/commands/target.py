"""What a command works on: a finished run, a base model or popularity, with its configuration and its data set, checked."""

import logging
from dataclasses import dataclass
from pathlib import Path

from rec_dist.commands.dtype import difference, saved_dtype, settle_dtype
from rec_dist.config.load import ConfigLike, load_config, load_saved
from rec_dist.config.overrides import Overrides
from rec_dist.config.paths import absolute, pinned
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import method_of
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.uri import expanded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """config: settled, without model.dtype=auto. run: the finished run that was named, None for a configuration.

    initial: what to score with, nothing for popularity.
    """

    config: RunConfig
    run: RunDirectory | None
    initial: InitialWeights
    data: PreparedData

    @property
    def saved(self) -> Path | None:
        """As in Ranker.weights."""
        return None if self.run is None or self.config.evaluate.ranker == "popularity" else self.run.model


def open_target(config: RunConfig, run: RunDirectory | None) -> Target:
    """What ranks, as read_target named it, and its data set.

    Raises UserError if there is no model, or if it cannot rank on the data.
    """
    if config.evaluate.ranker == "popularity":
        return Target(config, run, InitialWeights(Path()), open_data(config.data))
    ranker, saved = method_of(config).ranker, None if run is None else run.model
    initial = ranker.weights(config, saved)
    if run is None and (trained := Path(config.train.run_dir) / "finished.json").is_file():
        logger.info(f"this is the model that the configuration starts from; for what it has trained, give {trained.parent}")
    config, lines = settle_dtype(config, saved_dtype(base_results_dir(config) if run is None else run.path))
    for line in lines + ([] if run is None else difference(config, run.path, "the run")):
        logger.info(line)
    data = open_data(config.data)
    if saved is not None:
        ranker.check(saved, data)
    if config.evaluate.corrects and not (ranker.language_model and ranker.scores_titles(saved)):
        raise UserError(
            f"evaluate.title_prior and evaluate.length_power have no effect on task.kind={config.task.kind}, which scores no titles; "
            "remove them"
        )
    return Target(config, run, initial, data)


def read_target(target: ConfigLike, overrides: Overrides) -> tuple[RunConfig, RunDirectory | None]:
    """The configuration, and the finished run or None.

    A folder with the evaluation of a baseline or a base model counts as its configuration. Raises UserError as finished_run does.
    """
    if isinstance(target, str | Path):
        target = expanded(target)
        if target.is_dir():
            results = RunDirectory(target.absolute())
            if results.evaluation.is_file() and results.config_path.is_file() and results.finished() is None:
                return pinned(load_saved(results.config_path, overrides)), None
            return finished_run(target, overrides)
    return pinned(load_config(target, overrides)), None


def finished_run(target: Path, overrides: Overrides) -> tuple[RunConfig, RunDirectory]:
    """The run in the folder `target`, with its configuration changed by `overrides`.

    Raises UserError when no run is there, or it has no model.
    """
    run = RunDirectory(absolute(str(target)))
    if not run.config_path.is_file():
        raise UserError(
            f"{target} is no run directory (config.yaml is missing); give one that `rec-dist train` wrote, or a CONFIG"
        )
    config = pinned(load_saved(run.config_path, overrides))
    if run.finished() is None:
        raise UserError(f"{target} is not finished, so it has no model yet; run `rec-dist train` on it to the end")
    if not any(run.model.glob("*.safetensors")):
        raise UserError(f"{run.model} holds no weights; remove finished.json and run `rec-dist train` again, to the same end")
    return config, run


def base_results_dir(config: RunConfig) -> Path:
    """Where the evaluation of a configuration (of its base model, or of a baseline) goes."""
    suffix = "popularity" if config.evaluate.ranker == "popularity" else "base"
    return absolute(config.evaluate.output_dir or f"{config.train.run_dir}-{suffix}")
