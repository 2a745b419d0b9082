"""`rec-dist distil`: a finished run of any kind teaches a sequential recommender, which then ranks in its place in milliseconds.

First the run ranks items after the history before training targets, in this process, as `rec-dist rank` does: in parts, so that
the same command continues after a stop or a kill. Then the recommender trains with these lists, as by `rec-dist train`.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.commands.rank import rank_to_parts
from rec_dist.commands.rank_request import BEAM, MAX_CATALOGUE
from rec_dist.commands.ranked_model import RankedModel, ranked_model
from rec_dist.commands.train import check_train, train
from rec_dist.config.load import ALL_SECTIONS, ConfigLike, load_config, load_saved
from rec_dist.config.overrides import Overrides
from rec_dist.config.paths import pinned
from rec_dist.config.schema import RunConfig
from rec_dist.config.yaml_text import escaped
from rec_dist.data.artifacts.recommendations import RecordBatch
from rec_dist.data.artifacts.scored_lists import LISTS_NAME, finish_lists, finished_lists, list_batch
from rec_dist.data.artifacts.teacher import TopItems
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, PopularityScorer
from rec_dist.methods.eval_examples import eval_examples_of
from rec_dist.methods.registry import method_of
from rec_dist.methods.sequential.config import DistilConfig, SequentialConfig
from rec_dist.methods.sequential.method import SEQUENTIAL
from rec_dist.ranking.choice import SearchSettings
from rec_dist.ranking.prefixes import TrainingPrefixes
from rec_dist.ranking.rank import Counts, Ranked, Wanted, rank_users
from rec_dist.ranking.search import SearchScorer
from rec_dist.ranking.unfinished import is_done, parts_folder, unfinished
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.disk import writing
from rec_dist.storage.files import make_folder
from rec_dist.storage.outputs import check_output
from rec_dist.storage.uri import expanded

logger = logging.getLogger(__name__)

_KEY = "task.sequential.distil.lists"
_RECIPE = "method/sasrec"  # what `--into sequential` trains
TOP_K = 50


@dataclass(frozen=True)
class DistilOptions:
    """top_k: items of a list. max_targets: the most training targets that the teacher ranks items for, the last of each user
    first; None: all. compare: whether the caller then compares both (commands/distil_table.py), so that what would stop an
    evaluation is found before the work."""

    top_k: int = TOP_K
    max_targets: int | None = None
    compare: bool = False


def distil(
    run_dir: Path,
    into: ConfigLike,
    overrides: Overrides = (),
    *,
    options: DistilOptions | None = None,
    progress: bool = True,
    owns_process: bool = True,
) -> RunDirectory:
    """Makes the lists of the finished run `run_dir`, unless they are there, and trains `into` with them.

    into: a configuration of task.kind=sequential, or "sequential" for what _on_data_of() describes; overrides are of it. Lists go
    into task.sequential.distil.lists, by default a folder beside train.run_dir; several students may share one. owns_process: as
    launch takes it. Raises UserError before anything is computed.
    """
    options, run_dir = options or DistilOptions(), expanded(run_dir)
    for name, value in (("top-k", options.top_k), ("max-targets", options.max_targets)):
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"--{name} ({value}) must be a whole number from 1 on")
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory (config.yaml is missing); give one that `rec-dist train` wrote")
    config = _student(into, run_dir, overrides)
    lists = config.task.section(SequentialConfig).distil.lists
    assert lists is not None
    _check_student(config)
    model = ranked_model(run_dir, {"data.path": escaped(config.data.path)})
    if options.compare:
        eval_examples_of(config, model.data)
    make_lists(model, Path(lists), options, exclude_seen=config.evaluate.exclude_seen, progress=progress)
    return train(config, progress=progress, owns_process=owns_process)


def _on_data_of(run_dir: Path) -> dict[str, Any]:
    """The shipped SASRec on the data of a run, with the questions of its evaluation, in a folder beside it."""
    unread = [section for section in ALL_SECTIONS if section not in ("data", "evaluate")]
    saved = load_saved(run_dir / "config.yaml", unread=unread, way_out="give --into a CONFIG that reads it")
    sections = {
        "data": saved.data.model_dump(),
        "evaluate": saved.evaluate.asked,
        "train": {"run_dir": f"{os.path.abspath(run_dir)}-student"},  # beside the run, also where `..` leads to it
    }
    return {"extends": _RECIPE, **escaped(sections)}


def _student(into: ConfigLike, run_dir: Path, overrides: Overrides) -> RunConfig:
    config = load_config(_on_data_of(run_dir) if into == SEQUENTIAL.name else into, overrides)
    if method_of(config) is not SEQUENTIAL:
        raise UserError(
            f"--into has task.kind={config.task.kind}, and a student is a sequential recommender; give a CONFIG of "
            "task.kind=sequential, or --into sequential for SASRec on the run's data"
        )
    if config.task.section(SequentialConfig).distil.lists is None:
        config = load_config(config, {_KEY: f"{config.train.run_dir.rstrip('/')}-lists"})
    return pinned(config)


def _check_student(config: RunConfig) -> None:
    """Raises UserError for what training would refuse, before a teacher works for hours. The lists may not be there yet."""
    settings, (name, _) = config.task.section(SequentialConfig).model_copy(update={"distil": DistilConfig()}), SEQUENTIAL.section
    alone = config.model_copy(update={"task": config.task.model_copy(update={name: settings})})
    check_output(Path(config.train.run_dir), "train.run_dir", folder=True, may_exist=True)
    check_train(alone)


def make_lists(model: RankedModel, folder: Path, options: DistilOptions, *, exclude_seen: bool, progress: bool = True) -> None:
    """Writes the lists into `folder`, unless they are there. Raises UserError for a folder with those of another teacher."""
    check_output(folder, _KEY, folder=True, may_exist=True)
    targets, wanted = TrainingPrefixes(model.data, options.max_targets), whole_catalogue(model, options.top_k, exclude_seen)
    inputs = {
        **model.identity,
        "targets": targets.identity,
        "top_k": options.top_k,
        "exclude_seen": exclude_seen,
        "block": wanted.block_size(model.titles_read(wanted.longest)),
    }
    output = folder / LISTS_NAME
    begun = parts_folder(output).exists()  # looked at first: another process may finish the lists right now
    if finished_lists(folder, inputs=inputs):
        shutil.rmtree(parts_folder(output), ignore_errors=True)  # of a command that was killed just before it removed them
        logger.info(f"{folder} holds the lists already")
        return
    logger.info(f"the teacher ranks items for {targets.total:,} training targets")
    make_folder(folder)
    if output.is_file() and not begun:
        output.unlink()  # without teacher.json or parts nobody knows whose lists they are
    finish = partial(finish_lists, folder, rows=targets.total, data_fingerprint=model.data.manifest.fingerprint, inputs=inputs)
    if not is_done(output, inputs, _KEY, then=finish):
        try:
            _rank(model, targets, wanted, output, inputs, finish, progress)
        except UserError:
            with suppress(OSError):  # it holds parts
                folder.rmdir()
            raise
    logger.info(f"lists of {options.top_k} items for {targets.total:,} training targets in {folder}")


def whole_catalogue(model: RankedModel, top_k: int, exclude_seen: bool) -> Wanted:
    """The best top_k of all items. A language model that scores titles is searched for them.

    Raises UserError for more titles than it should score one by one where it cannot be searched.
    """
    num_items = model.data.num_items
    searches = model.takes_new_items and not model.config.evaluate.corrects
    if model.slow and not searches:
        _check_work(num_items)
    search = SearchSettings(exact=True, beam=BEAM, max_rows=None) if searches else None
    return Wanted(np.arange(num_items, dtype=np.int32), num_items, top_k, exclude_seen, search=search)


def searchable(wanted: Wanted, scorer: CandidateScorer) -> Wanted:
    """The same without a search for a language model whose method has a score of its own. Raises UserError as whole_catalogue."""
    if wanted.search is None or isinstance(scorer, SearchScorer):
        return wanted
    _check_work(wanted.num_items)
    return replace(wanted, search=None)


def _check_work(num_items: int) -> None:
    """Raises UserError for more titles than a language model should score one by one."""
    if num_items > MAX_CATALOGUE:
        raise UserError(
            f"this teacher would score {num_items:,} titles for each target, more than {MAX_CATALOGUE:,}; give an ensemble with "
            "task.ensemble.rerank, whose language model scores the titles of the items that its other members retrieve"
        )


def _rank(
    model: RankedModel,
    targets: TrainingPrefixes,
    wanted: Wanted,
    output: Path,
    inputs: dict[str, Any],
    finish: Callable[[], None],
    progress: bool,
) -> None:
    popularity, size = PopularityScorer(model.data.train_counts), inputs["block"]

    def blocks(start: int) -> Iterator[tuple[RecordBatch, Counts]]:
        with model.scorer() as scorer:
            for ranked in rank_users(targets, scorer, popularity, searchable(wanted, scorer), size=size, start=start):
                yield _batch(ranked, targets, start, wanted.top_k), ranked.counts
                start += len(ranked.users)

    with unfinished(output, inputs, _KEY) as parts, writing(output):
        rank_to_parts(blocks, targets.total, parts, progress, model.config.cluster.hang_seconds, then=finish)


def _batch(ranked: Ranked, targets: TrainingPrefixes, start: int, top_k: int) -> RecordBatch:
    """The lists of a block of targets, of which number `start` is the first. Shorter lists end with -1."""
    num = len(ranked.users)
    items = np.full((num, top_k), -1, dtype=np.int32)
    scores = np.zeros((num, top_k), dtype=np.float32)
    items[ranked.user, ranked.rank - 1], scores[ranked.user, ranked.rank - 1] = ranked.item, ranked.score
    return list_batch(TopItems(targets.user_ids[start : start + num], targets.positions[start : start + num], items), scores)
