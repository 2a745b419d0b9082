"""Makes the lists of negatives.kind=model: a finished run ranks items for every training target, and a window of ranks is kept.

The first ranks are left out, since many of their items are what the user would have liked (false negatives). Items of the history
and the target are never in a list. A recommender ranks the whole catalogue; a language model, which reads titles, ranks
negatives.pool items that are drawn by hash for each target.

Cost: one evaluation of all training targets, before the first step. A run that was stopped reads the lists back.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.hard_negatives import HardNegatives, read_hard_negatives, write_hard_negatives
from rec_dist.data.artifacts.teacher import TopItems
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.sampling.negatives import NegativeSampler
from rec_dist.data.sampling.targets import index_targets
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.finished_run import FinishedRun, open_finished
from rec_dist.methods.method import Evaluation, Launch
from rec_dist.ranking.selection import best_of
from rec_dist.runtime.arrays import I32
from rec_dist.runtime.rng import hash_u64
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.checksums import verify_checksums
from rec_dist.storage.files import fingerprint

_POOL = 41  # its own stream of draws
_AT_ONCE = 4096  # targets of a part


def source_of(config: RunConfig) -> FinishedRun:
    """The run in negatives.model. Raises UserError if the section `negatives` does not describe lists."""
    negatives = config.negatives
    if negatives.model is None:
        raise UserError("negatives.kind=model needs a finished run; set negatives.model=RUN_DIR")
    first, last = negatives.ranks
    if not 1 <= first <= last:
        raise UserError(f"negatives.ranks ({first}, {last}) must be two ranks from 1 on, the first no larger than the last")
    if last - first + 1 < negatives.num:
        raise UserError(f"negatives.ranks ({first}, {last}) holds fewer items than negatives.num ({negatives.num}); widen it")
    if negatives.pool is not None and negatives.pool < last:
        raise UserError(f"negatives.pool ({negatives.pool}) is smaller than the last of negatives.ranks ({last}); raise it")
    source = open_finished("negatives.model", Path(negatives.model))
    if negatives.pool is None and source.ranker.scores_titles(source.folder):
        raise UserError(
            f"negatives.model ({negatives.model}) reads the title of every item that it ranks; set negatives.pool=100, say, to let "
            "it rank so many that are drawn for each target"
        )
    return source


def check_source(config: RunConfig, data: PreparedData) -> None:
    """Raises UserError if the run in negatives.model is damaged or cannot rank on `data`."""
    source = source_of(config)
    verify_checksums(source.folder)
    source.ranker.check(source.folder, data)


def hard_negatives(config: RunConfig, data: PreparedData) -> HardNegatives | None:
    """The lists in the run directory; None as long as the driver has not made them."""
    return read_hard_negatives(Path(config.train.run_dir), key=lists_key(config, data))


def lists_key(config: RunConfig, data: PreparedData) -> str:
    """Changes with the run in negatives.model, the data and the keys that shape the lists."""
    source, negatives = source_of(config), config.negatives
    prints = source.ranker.weights(source.on(config), source.folder).fingerprints()
    return fingerprint([prints, data.manifest.fingerprint, negatives.ranks, negatives.pool, config.train.seed])


def make_hard_negatives(config: RunConfig, run: RunDirectory, launch: Launch) -> None:
    """Writes the lists into the run directory, unless they are there. launch: for a run that scores on workers."""
    data, source = open_data(config.data), source_of(config)
    key = lists_key(config, data)
    if read_hard_negatives(run.path, key=key) is not None:
        return
    examples = training_examples(data, pool=config.negatives.pool, seed=config.train.seed)
    run.log(f"negatives.kind=model: {source.folder} ranks items for {len(examples):,} training targets")
    own = source.on(config)
    asked = Evaluation(own, data, examples, source.ranker.weights(own, source.folder), source.folder, run, own_examples=True)
    scores, _ = source.ranker.score(asked, launch)
    first, last = config.negatives.ranks
    parts = _parts(examples, scores, data.held_out, first, last)
    write_hard_negatives(run.path, parts, width=last - first + 1, key=key)


def training_examples(data: PreparedData, *, pool: int | None, seed: int) -> list[EvalExample]:
    """Every target of the train split after what comes before it, in ascending (user, position) order.

    pool: so many candidates drawn by hash outside history and target, and the target; None: the whole catalogue.
    """
    split = data.split("train")
    targets = index_targets(split, 1)
    catalogue = np.arange(data.num_items, dtype=np.int32)
    draws = None if pool is None else int(hash_u64(seed, _POOL) >> np.uint64(1))
    examples = []
    for row, position in zip(targets.rows.tolist(), targets.starts.tolist(), strict=True):
        items, user = split.items_of(row), int(split.user_ids[row])
        candidates = catalogue
        if pool is not None and draws is not None:
            sampler = NegativeSampler("uniform", pool, draws, data.train_counts, held_out=data.held_out)
            drawn = sampler.draw(epoch=0, user=user, position=position, seen=items[: position + 1], explicit_negatives=items[:0])
            candidates = np.append(drawn, items[position])
        examples.append(EvalExample(user, position, int(items[position]), items[:position], candidates))
    return examples


def window(scores: npt.NDArray[np.floating[Any]], example: EvalExample, held_out: I32, first: int, last: int) -> I32:
    """The candidates at ranks first..last among those outside history, target and held_out: (last - first + 1,), then -1."""
    allowed = ~np.isin(example.candidates, np.concatenate([example.history, [example.target], held_out]))
    items = example.candidates[allowed]
    best = items[best_of(items, scores[allowed], last)[first - 1 :]]
    return np.pad(best, (0, last - first + 1 - len(best)), constant_values=-1).astype(np.int32)


def _parts(
    examples: list[EvalExample], scores: Iterable[npt.NDArray[np.floating[Any]]], held_out: I32, first: int, last: int
) -> Iterator[TopItems]:
    given = iter(scores)
    for begin in range(0, len(examples), _AT_ONCE):
        block = examples[begin : begin + _AT_ONCE]
        lists = [window(own, e, held_out, first, last) for e, own in zip(block, islice(given, len(block)), strict=True)]
        users, positions = np.asarray([e.user_id for e in block]), np.asarray([e.position for e in block])
        yield TopItems(users.astype(np.int64), positions.astype(np.int64), np.stack(lists))
