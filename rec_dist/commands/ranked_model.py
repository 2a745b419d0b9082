"""What `rec-dist rank` and `rec-dist serve` rank with: the model of a finished run, a base model, or popularity, and its data set."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.commands.dtype import difference, saved_dtype, settle_dtype
from rec_dist.commands.evaluate import check_corrections, finished_run
from rec_dist.config.load import ConfigLike, load_config, load_saved
from rec_dist.config.overrides import Overrides
from rec_dist.config.paths import absolute, pinned
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, PopularityScorer
from rec_dist.launch.workers import local_device
from rec_dist.methods.registry import method_of
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankedModel:
    """scorer_on: loads the model into this process and gives its scorer on a data set. identity: tells it and its data from others.

    config: settled, without model.dtype=auto. saved: as in Ranker.weights. members: the names of an ensemble's members.
    slow: whether a score takes milliseconds, as a language model's does. takes_new_items: whether an item's title is all that
    the model must know of it.
    """

    config: RunConfig
    saved: Path | None
    members: list[str]
    data: PreparedData
    scorer_on: Callable[[PreparedData], AbstractContextManager[CandidateScorer]]
    identity: dict[str, Any]
    slow: bool
    takes_new_items: bool

    def scorer(self) -> AbstractContextManager[CandidateScorer]:
        """The scorer on `data`."""
        return self.scorer_on(self.data)

    def with_items(self, ids: Sequence[str], titles: Sequence[str]) -> "RankedModel":
        """The same model, with new items behind those of its data set."""
        assert self.takes_new_items
        data = replace(
            self.data,
            titles=[*self.data.titles, *titles],
            raw_items=[*self.data.raw_items, *ids],
            categories=[*self.data.categories, *([] for _ in ids)],
            train_counts=np.concatenate([self.data.train_counts, np.zeros(len(ids), dtype=np.int64)]),
        )
        return replace(self, data=data, identity={**self.identity, "new_items": fingerprint([[*ids], [*titles]])})


def ranked_model(target: ConfigLike, overrides: Overrides) -> RankedModel:
    """The model that a run directory or a configuration names.

    Raises UserError if there is none, if it is damaged, or if it cannot rank on its data.
    """
    config, saved = _configuration(target, overrides)
    if config.evaluate.ranker == "popularity":
        data = open_data(config.data)
        of_popularity = {"model": "popularity", "data": data.manifest.fingerprint}
        popularity = lambda data: nullcontext(PopularityScorer(data.train_counts))
        return RankedModel(config, None, [], data, popularity, of_popularity, slow=False, takes_new_items=False)
    method = method_of(config)
    initial = method.ranker.weights(config, saved)
    config, lines = settle_dtype(config, None if saved is None else saved_dtype(saved.parent))
    for line in lines + ([] if saved is None else difference(config, saved.parent, "the run")):
        logger.info(line)
    data = open_data(config.data)
    if saved is not None:
        method.ranker.check(saved, data)
    check_corrections(config, saved)
    initial.check_model()
    identity: dict[str, Any] = {"model": initial.fingerprints(), "data": data.manifest.fingerprint, "task": _own_keys(config)}
    slow = method.ranker.scores_titles(saved)
    if method.ranker.language_model or slow:
        identity |= {"prompt": config.prompt.model_dump(), "dtype": config.model.dtype}
        identity["corrections"] = [config.evaluate.title_prior, config.evaluate.length_power]
    # Packing changes the last bits of scores, and so does the number of threads; the former alone is in our hands.
    identity["max_tokens_per_micro_batch"] = config.train.max_tokens_per_micro_batch if slow else None
    device = local_device(config.cluster.model_copy(update={"num_workers": "auto"}))  # this process alone, whatever trained
    scorer_on = lambda data: method.ranker.scoring(config, data, initial, saved, device)
    members, takes_new_items = [name for name, _ in initial.members], slow and method.ranker.language_model
    return RankedModel(config, saved, members, data, scorer_on, identity, slow, takes_new_items)


def scorer_of(
    config: RunConfig, data: PreparedData, saved: Path | None, device: str, wanted: dict[str, str | None]
) -> AbstractContextManager[CandidateScorer]:
    """The scorer of RankedModel.config and .saved in another process. wanted: identity["model"], as it was settled.

    Raises UserError if other files lie there by now.
    """
    if config.evaluate.ranker == "popularity":
        return nullcontext(PopularityScorer(data.train_counts))
    ranker = method_of(config).ranker
    initial = ranker.weights(config, saved)
    if initial.fingerprints() != wanted:
        raise UserError(f"{initial.model} was written again meanwhile; run the same command again")
    return ranker.scoring(config, data, initial, saved, device)


def _configuration(target: ConfigLike, overrides: Overrides) -> tuple[RunConfig, Path | None]:
    """The configuration, and the model folder of a finished run or None.

    A folder with the evaluation of a baseline or a base model counts as its configuration.
    """
    if not (isinstance(target, str | Path) and Path(target).is_dir()):
        return pinned(load_config(target, overrides)), None
    results = RunDirectory(absolute(str(target)))
    if results.evaluation.is_file() and results.config_path.is_file() and results.finished() is None:
        return pinned(load_saved(results.config_path, overrides)), None
    config, run = finished_run(Path(target), overrides)
    return config, None if config.evaluate.ranker == "popularity" else run.model


def _own_keys(config: RunConfig) -> dict[str, Any]:
    """The method's own section, which its ranker may read, without paths."""
    section = method_of(config).section
    return {} if section is None else config.task.section(section[1]).without_paths()
