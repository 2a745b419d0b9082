"""Prepares a source that fits in memory: clean, order, split, write. Nothing here loops over rows.

Cost on one core: 0.3 s for ML-100K, 2.8 s for ML-1M, 4 s for 2 million rows of csv; at most 0.3 GB per million rows.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.schema import SPLITS
from rec_dist.data.prepare import rules
from rec_dist.data.prepare import splits as split_rules
from rec_dist.data.prepare.outcome import Counts, Prepared
from rec_dist.data.prepare.positives import Rows, count_ties, k_core, ordered, renumber
from rec_dist.data.prepare.sequences import split_sequences
from rec_dist.data.prepare.shards import Sequences, prefix_index, write_items, write_split
from rec_dist.data.prepare.splits import Split
from rec_dist.data.prepare.titles import make_distinct
from rec_dist.data.sources import Source
from rec_dist.data.sources.assemble import in_use
from rec_dist.data.sources.interactions import Bool, Interactions, ItemTable
from rec_dist.data.sources.source import read_all
from rec_dist.runtime.arrays import I64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Clean:
    """Rows (N,) of users 0..U-1 and items 0..I-1 in time order, their names, and counts of what happened to the rows."""

    rows: Rows
    raw_users: list[str]
    items: ItemTable
    counts: Counts


def prepare_in_memory(source: Source, config: DataConfig, folder: Path) -> Prepared:
    """Writes items and shards into `folder`. Raises UserError for unreadable rows, or settings that leave no rows."""
    interactions = read_all(source, config.max_bad_rows)
    for note in interactions.notes:
        logger.info(note)
    clean = _clean(interactions, config)
    cold = rules.cold_items(config, clean.items.raw)
    sequences, split = _split(clean, config, cold)
    cuts = {"train": split.train, "valid": split.valid, "test": split.test}
    known = sequences if cold is None else sequences.without(cold)  # what the train and valid splits hold
    return Prepared(
        cuts={"valid_from": split.valid_from, "test_from": split.test_from},
        counts=clean.counts,
        bad_rows=interactions.bad_rows,
        notes=interactions.notes,
        items=write_items(folder, clean.items, _train_count(known, split, len(clean.items))),
        splits={
            name: write_split(folder, name, cuts[name], sequences if name == "test" else known, config.num_shards)
            for name in SPLITS
        },
    )


def _clean(interactions: Interactions, config: DataConfig) -> _Clean:
    """Makes titles distinct, orders rows in time, drops repeats, marks positives and applies the k-core."""
    numbered = np.arange(len(interactions), dtype=np.int64) if interactions.timestamp is None else interactions.timestamp
    has_times = interactions.timestamp is not None
    interactions = _titled(replace(interactions, timestamp=numbered))
    num_raw = len(interactions)
    rules.check_rows(config, num_raw, ratings=interactions.rating is not None, timestamps=has_times)
    used, old_item = renumber(interactions.item)
    distinct = make_distinct(interactions.items.take(old_item), merge=config.merge_equal_titles)
    rules.say_titles(distinct)
    assert interactions.timestamp is not None, "rows are numbered"
    once, repeats = ordered(
        interactions.user, distinct.new_index[used], interactions.timestamp, interactions.rating, config.min_rating
    )
    core = k_core(once, config.min_user_interactions, config.min_item_interactions)
    rules.check_core(config, int(once.positive.sum()), int(core.positive.sum()))
    user, old_user = renumber(core.user)
    item, old_title = renumber(core.item)
    rows = Rows(user, item, core.timestamp, core.rating, core.positive)
    ties, followers = count_ties(user[rows.positive], rows.timestamp[rows.positive])
    counts = Counts(
        raw_rows=num_raw,
        repeated_rows=repeats,
        titles_with_year=distinct.num_with_year,
        merged_items=distinct.num_merged,
        core_dropped_positives=int(once.positive.sum() - rows.positive.sum()),
        users=len(old_user),
        items=len(old_title),
        positives=int(rows.positive.sum()),
        explicit_negatives=int((~rows.positive).sum()),
        ties=ties,
        followers=followers,
    )
    rules.say_counts(counts)
    raw_users = [interactions.raw_users[index] for index in old_user.tolist()]
    return _Clean(rows, raw_users, distinct.items.take(old_title), counts)


def _titled(interactions: Interactions) -> Interactions:
    """The rows of items that have a title. Users stay in the order of their first row."""
    titled = np.array([bool(title) for title in interactions.items.titles], dtype=bool)[interactions.item]
    if titled.all():
        return interactions
    user, kept = in_use(interactions.user[titled])
    columns = {name: getattr(interactions, name) for name in ("item", "rating", "timestamp")}
    rows: dict[str, Any] = {name: values if values is None else values[titled] for name, values in columns.items()}
    return replace(interactions, user=user, raw_users=[interactions.raw_users[index] for index in kept.tolist()], **rows)


def _split(clean: _Clean, config: DataConfig, cold: Bool | None) -> tuple[Sequences, Split]:
    """Cuts the sequences by data.split: the whole ones, and cuts for the train and valid splits that count no cold item (I,).

    Raises UserError if a requested split is empty.
    """
    rules.say_split(config)
    cuts = None
    if config.split == "global_temporal":
        times = np.sort(clean.rows.timestamp[clean.rows.positive])
        valid_at, test_at = split_rules.cut_places(len(times), config.valid_fraction, config.test_fraction)
        cuts = int(times[valid_at]), int(times[test_at])
    sequences, split, hashes = split_sequences(clean.rows, pa.array(clean.raw_users, pa.string()), config, cuts, cold)
    split = replace(split, train=split_rules.few_shot(split.train, hashes, config.max_train_users))
    rows = {"train": len(split.train.users), "valid": len(split.valid.users), "test": len(split.test.users)}
    rules.check_split(config, rows, clean.counts.positives, clean.counts.users)
    return sequences, split


def _train_count(known: Sequences, split: Split, num_items: int) -> I64:
    """(I,): how often each item occurs in rows of the train split."""
    flat = prefix_index(known.offsets, split.train.users, split.train.length)
    return np.bincount(known.item[flat], minlength=num_items).astype(np.int64)
