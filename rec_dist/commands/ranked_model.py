"""What `rec-dist rank` and `rec-dist serve` rank with: the model of a finished run, a base model, or popularity, and its data set."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.commands.target import open_target, read_target
from rec_dist.config.load import ConfigLike
from rec_dist.config.overrides import Overrides
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.sources.listings import as_text, place_of, read_titles
from rec_dist.data.sources.text import Cleaning
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, PopularityScorer
from rec_dist.launch.workers import local_device
from rec_dist.methods.registry import method_of
from rec_dist.storage.files import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankedModel:
    """scorer_on: loads the model into this process and gives its scorer on a data set. identity: tells it and its data from others.

    config: settled, without model.dtype=auto. saved: as in Ranker.weights. members: the names of an ensemble's members.
    slow: whether a score takes milliseconds, as a language model's does. takes_new_items: whether an item's title is all that
    the model must know of it. titles_read: how many titles a language model reads to rank so many candidates of one user.
    new_items: ids and titles of those that `data` has behind the items of its folder.
    """

    config: RunConfig
    saved: Path | None
    members: list[str]
    data: PreparedData
    scorer_on: Callable[[PreparedData], AbstractContextManager[CandidateScorer]]
    identity: dict[str, Any]
    slow: bool
    takes_new_items: bool
    titles_read: Callable[[int], int] = lambda num_candidates: 0
    new_items: tuple[list[str], list[str]] = ([], [])

    def scorer(self) -> AbstractContextManager[CandidateScorer]:
        """The scorer on `data`."""
        return self.scorer_on(self.data)

    def with_items(self, ids: Sequence[str], titles: Sequence[str]) -> "RankedModel":
        """The same model, with new items behind those of its data set."""
        assert self.takes_new_items
        identity = {**self.identity, "new_items": fingerprint([[*ids], [*titles]])}
        return replace(self, data=with_items(self.data, ids, titles), identity=identity, new_items=([*ids], [*titles]))

    @property
    def elsewhere(self) -> "ElsewhereModel":
        """The same model for another process."""
        return ElsewhereModel(self.config.model_dump(), self.saved, self.identity["model"], self.new_items)


@dataclass(frozen=True)
class ElsewhereModel:
    """What another process needs to load a RankedModel that this one has checked. Fields as there; model: identity["model"]."""

    config: dict[str, Any]
    saved: Path | None
    model: Any
    new_items: tuple[list[str], list[str]]

    def load(self, device: str) -> tuple[PreparedData, AbstractContextManager[CandidateScorer]]:
        """The data set and the scorer on it. Raises UserError if other files lie there by now."""
        config = RunConfig.model_validate(self.config)
        data = open_data(config.data)
        if self.new_items[0]:
            data = with_items(data, *self.new_items)
        return data, scorer_of(config, data, self.saved, device, self.model)


def with_items(data: PreparedData, ids: Sequence[str], titles: Sequence[str]) -> PreparedData:
    """The data set with new items behind its own, which nobody has chosen."""
    return replace(
        data,
        titles=[*data.titles, *titles],
        raw_items=[*data.raw_items, *ids],
        categories=[*data.categories, *([] for _ in ids)],
        train_counts=np.concatenate([data.train_counts, np.zeros(len(ids), dtype=np.int64)]),
    )


def ranked_model(target: ConfigLike, overrides: Overrides) -> RankedModel:
    """The model that a run directory or a configuration names.

    Raises UserError if there is none, if it is damaged, or if it cannot rank on its data.
    """
    named = open_target(*read_target(target, overrides))
    config, data, initial, saved = named.config, named.data, named.initial, named.saved
    if config.evaluate.ranker == "popularity":
        of_popularity = {"model": "popularity", "data": data.manifest.fingerprint}
        popularity = lambda data: nullcontext(PopularityScorer(data.train_counts))
        return RankedModel(config, None, [], data, popularity, of_popularity, slow=False, takes_new_items=False)
    method = method_of(config)
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
    titles_read = partial(method.ranker.titles_read, saved)
    return RankedModel(config, saved, members, data, scorer_on, identity, slow, takes_new_items, titles_read)


def with_new_items(model: RankedModel, items: Path | Mapping[Any, Any] | None) -> RankedModel:
    """The model with the items of a file, or of a mapping of ids to titles, behind its own. Titles are cleaned as in its data set.

    Raises UserError for a model that does not read titles, and for an item that is there already or has no title.
    """
    if items is None:
        return model
    if not model.takes_new_items:
        raise UserError(
            "--items gives titles of new items, and this run can only rank the items of its data set; leave it out, or rank with the "
            "run of a language model that scores titles"
        )
    cleaning = Cleaning("titles of --items", bool(model.data.manifest.settings.get("clean_text", True)))
    known, ids, titles = set(model.data.raw_items), list[str](), list[str]()
    for place, item, title in _new_items(items):
        if item in known:
            raise UserError(
                f"{place}: the item {item!r} is in the data set already, or occurs twice; give each new item its own id"
            )
        title = " ".join(cleaning(title).split())
        if not title:
            raise UserError(f"{place}: the item {item!r} has an empty title, which cannot be scored; give it one")
        known.add(item)
        ids.append(item)
        titles.append(title)
    for note in cleaning.notes():
        logger.info(note)
    return model.with_items(ids, titles)


def _new_items(items: Path | Mapping[Any, Any]) -> Iterator[tuple[str, str, str]]:
    """(its place for messages, item, title) of each new item."""
    if isinstance(items, Path):
        for row, item, title in read_titles(items, "--items"):
            yield place_of(items, row), item, title
        return
    if not isinstance(items, Mapping):
        raise UserError(f"items is of type {type(items).__name__}; give a path, or a mapping of new ids to titles")
    for item, title in items.items():
        place = f"items[{item!r}]"
        yield place, as_text(item, place), as_text(title, place)


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


def _own_keys(config: RunConfig) -> dict[str, Any]:
    """The method's own section, which its ranker may read, without paths."""
    section = method_of(config).section
    return {} if section is None else config.task.section(section[1]).without_paths()
