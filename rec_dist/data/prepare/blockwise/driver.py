"""The steps in order, and what must be known of all of them: the catalogue, the k-core, the cuts, where users and shards begin.

    block   --Spill-->   buckets of users   --Order, CoreCount ..., Describe, Deal-->   ranges of users   --Cutting, Count-->   shards

Memory of this process: the catalogue (about 0.5 KB an item) and counts, nothing a row or a user. Disk: about 150 bytes a row in
the work folder beside data.path. `run_map` runs the jobs of a step: here, or on a cluster.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.index import write_index
from rec_dist.data.dataset.manifest import SplitEntry
from rec_dist.data.dataset.schema import SPLITS
from rec_dist.data.prepare import rules
from rec_dist.data.prepare import splits as split_rules
from rec_dist.data.prepare.blockwise.hash_partitions import CoreCount, Deal, Describe, GlobalBatchSampler, times_path
from rec_dist.data.prepare.blockwise.hash_shuffle import Spill, save_item_index, save_known, titles_path
from rec_dist.data.prepare.blockwise.row_ranges import Count, Cutting, RangeReader, WriteShard, shard_jobs
from rec_dist.data.prepare.blockwise.scratch import load_array, save_array
from rec_dist.data.prepare.blockwise.selection import last_of_few_shot, nth_smallest
from rec_dist.data.prepare.outcome import Counts, Prepared
from rec_dist.data.prepare.shards import write_items
from rec_dist.data.prepare.titles import DistinctItems, make_distinct
from rec_dist.data.sources.blocks import Block, is_packed, moved, unpack
from rec_dist.data.sources.interactions import Bool
from rec_dist.data.sources.source import Joined, Source
from rec_dist.runtime.arrays import I64

logger = logging.getLogger(__name__)

STEP = "prepare,"  # begins the line that a step is announced with
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Sizes:
    """How large the pieces are: bytes of text a block, rows a bucket of users, rows a range of users."""

    block_bytes: int = 1 << 25
    bucket_rows: int = 2_000_000
    range_rows: int = 2_000_000
    num_bins: int = 1 << 14  # stretches of the source that ranges are made of


def prepare_blockwise(source: Source, config: DataConfig, folder: Path, work: Path, run_map: Map, sizes: Sizes) -> Prepared:
    """Writes items and shards into `folder` by way of files in `work`. UserError: as prepare_in_memory."""
    run = _Run(config, work, run_map, sizes)
    spilled = run.spill(source)
    distinct = run.make_titles(spilled)
    core = run.reduce(spilled, distinct)
    cuts = run.cut_times(core)
    ranges = run.deal(core)
    reader, rows, targets, train_count = run.split(core, ranges, cuts)
    shards = list(run.each("write shards", WriteShard(reader, folder), shard_jobs(rows, config.num_shards)))
    splits = {}
    for place, name in enumerate(SPLITS):
        mine = shards[place * config.num_shards : (place + 1) * config.num_shards]
        splits[name] = SplitEntry(int(rows[name][-1]), targets[name], mine, write_index(folder, name, mine))
    alive = distinct.items.take(np.flatnonzero(core.alive))
    return Prepared(
        cuts={"valid_from": cuts[0] if cuts else None, "test_from": cuts[1] if cuts else None},
        counts=core.counts,
        bad_rows=spilled.joined.bad.in_order(),
        notes=spilled.joined.notes(),
        items=write_items(folder, alive, train_count),
        splits=splits,
    )


@dataclass(frozen=True)
class _Spilled:
    """The source in buckets. first_rows (B+1,): rows before each block; used (I,): which items any row names."""

    joined: Joined
    first_rows: I64
    used: Bool
    num_buckets: int

    @property
    def num_rows(self) -> int:
        return int(self.first_rows[-1])


@dataclass(frozen=True)
class _Core:
    """What the k-core leaves. alive (I,); user and row histograms over stretches of the source."""

    alive: Bool
    alive_path: Path
    counts: Counts
    num_rows: int
    num_buckets: int
    user_histogram: I64
    row_histogram: I64


class _Run:
    """The steps, each over all its jobs."""

    def __init__(self, config: DataConfig, work: Path, run_map: Map, sizes: Sizes) -> None:
        self._config, self._work, self._map, self._sizes = config, work, run_map, sizes

    def each(self, step: str, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterable[Any]:
        """The results of a step, in the order of its jobs."""
        logger.info(f"{STEP} {step}: {len(jobs)} job{'s' if len(jobs) != 1 else ''}")
        return self._map(function, jobs)

    def spill(self, source: Source) -> _Spilled:
        """Reads every block and deals its rows to buckets."""
        config, work = self._config, self._work
        files = self._unpacked(source.files)
        blocks = [block for file in files for block in source.rows.cut(file, self._sizes.block_bytes)]
        num_buckets = max(-(-sum(source.rows.num_rows(file) for file in files) // self._sizes.bucket_rows), 1)
        known_path = None
        if source.known is not None:
            known_path = work / "known.arrow"
            save_known(known_path, source.known)
        joined, num_rows, used = Joined(source), [0], [np.zeros(0, dtype=np.int64)]
        ratings = timestamps = True
        for report in self.each("read", Spill(source.rows, known_path, work, num_buckets), list(enumerate(blocks))):
            save_item_index(work, report.index, joined.add(report.block, report.rows))
            num_rows.append(report.num_rows)
            used = [np.union1d(used[0], report.used)]
            ratings, timestamps = report.has_rating, report.has_timestamp
        joined.bad.check(config.max_bad_rows)
        for note in joined.notes():
            logger.info(note)
        rules.check_rows(config, sum(num_rows), ratings=ratings, timestamps=timestamps)
        named = np.ones(len(joined.items), dtype=bool)
        if source.items is not None:
            named = np.isin(np.arange(len(joined.items)), used[0])
        return _Spilled(joined, np.cumsum(num_rows, dtype=np.int64), named, num_buckets)

    def _unpacked(self, files: list[Block]) -> list[Block]:
        packed = [(file.path, self._work / f"unpacked-{file.file}") for file in files if is_packed(file.path)]
        if packed:
            list(self.each("unpack", _unpack, packed))
        return [moved(file, dict(packed)) for file in files]

    def make_titles(self, spilled: _Spilled) -> DistinctItems:
        """Distinct titles of the items that rows name."""
        distinct = make_distinct(spilled.joined.items.take(np.flatnonzero(spilled.used)))
        rules.say_titles(distinct)
        titles = np.full(len(spilled.used), -1, dtype=np.int64)
        titles[spilled.used] = distinct.new_index
        save_array(titles_path(self._work), titles)
        return distinct

    def reduce(self, spilled: _Spilled, distinct: DistinctItems) -> _Core:
        """Time order, repeats and the k-core, a round over all buckets at a time, until no item goes."""
        config, work, buckets = self._config, self._work, range(spilled.num_buckets)
        ordered = list(self.each("order", GlobalBatchSampler(work, spilled.first_rows, config.min_rating), buckets))
        self._drop("rows-*", "unpacked-*")
        min_user, min_item = max(config.min_user_interactions, 1), max(config.min_item_interactions, 1)
        alive, path, before = np.ones(len(distinct.items), dtype=bool), work / "alive-0.npy", -1
        rounds = 0
        while int(alive.sum()) != before:
            before, rounds = int(alive.sum()), rounds + 1
            path = work / f"alive-{rounds}.npy"
            save_array(path, alive)
            chosen = np.zeros(len(alive), dtype=np.int64)
            for items, counts in self.each(f"k-core, round {rounds}", CoreCount(work, min_user, path), buckets):
                chosen[items] += counts
            alive = alive & (chosen >= min_item)
        describe = Describe(work, min_user, path, spilled.num_rows, self._sizes.num_bins)
        facts = list(self.each("count", describe, buckets))
        choices, chosen_before = sum(f.choices for f in facts), sum(choices for _, _, choices in ordered)
        rules.check_core(config, chosen_before, choices)
        counts = Counts(
            raw_rows=spilled.num_rows,
            repeated_rows=sum(repeats for _, repeats, _ in ordered),
            titles_with_year=distinct.num_with_year,
            merged_items=distinct.num_merged,
            core_dropped_choices=chosen_before - choices,
            users=sum(f.users for f in facts),
            items=int(alive.sum()),
            choices=choices,
            explicit_negatives=sum(f.explicit_negatives for f in facts),
            ties=sum(f.ties for f in facts),
            followers=sum(f.followers for f in facts),
        )
        rules.say_counts(counts)
        users, rows = sum(f.user_histogram for f in facts), sum(f.row_histogram for f in facts)
        assert isinstance(users, np.ndarray) and isinstance(rows, np.ndarray), "a bucket at least"
        return _Core(alive, path, counts, spilled.num_rows, spilled.num_buckets, users, rows)

    def cut_times(self, core: _Core) -> tuple[int, int] | None:
        """The cuts of global_temporal: exact, by bisection over the buckets' ordered timestamps."""
        if self._config.split != "global_temporal":
            return None
        times = [load_array(times_path(self._work, bucket)) for bucket in range(core.num_buckets)]
        places = split_rules.cut_places(core.counts.choices, self._config.valid_fraction, self._config.test_fraction)
        valid_from, test_from = (nth_smallest(times, place) for place in places)
        return valid_from, test_from

    def deal(self, core: _Core) -> I64:
        """Ranges of users with about as many rows each; returns how many users stand before each (P+1,)."""
        rows = np.concatenate([[0], np.cumsum(core.row_histogram)])
        edges = [0]
        while edges[-1] < len(core.row_histogram):
            full = int(np.searchsorted(rows, rows[edges[-1]] + self._sizes.range_rows, side="right")) - 1
            edges.append(min(max(full, edges[-1] + 1), len(core.row_histogram)))
        deal = Deal(
            self._work,
            max(self._config.min_user_interactions, 1),
            core.alive_path,
            core.num_rows,
            self._sizes.num_bins,
            np.array(edges, dtype=np.int64),
        )
        list(self.each("deal to ranges of users", deal, range(core.num_buckets)))
        self._drop("once-*", "users-*", "times-*")
        return np.concatenate([[0], np.cumsum(core.user_histogram)])[edges].astype(np.int64)

    def split(
        self, core: _Core, first_users: I64, cuts: tuple[int, int] | None
    ) -> tuple[RangeReader, dict[str, I64], dict[str, int], I64]:
        """Cuts every range: (how to read them, rows before each range (P+1,) and targets of each split, train_count (I,))."""
        config, indices = self._config, range(len(first_users) - 1)
        rules.say_split(config)
        lowest = list(self.each("split", Cutting(self._work, core.num_buckets, first_users, config, cuts), indices))
        self._drop("dealt-*")
        reader = RangeReader(self._work, first_users, last_of_few_shot(lowest, config.max_train_users))
        facts = list(self.each("count targets", Count(reader), indices))
        rows = {name: np.cumsum([0, *(f.rows[name] for f in facts)], dtype=np.int64) for name in SPLITS}
        rules.check_split(config, {name: int(before[-1]) for name, before in rows.items()}, core.counts)
        train_count = np.zeros(core.counts.items, dtype=np.int64)
        for fact in facts:
            train_count[fact.train_items] += fact.train_counts
        return reader, rows, {name: sum(f.targets[name] for f in facts) for name in SPLITS}, train_count

    def _drop(self, *patterns: str) -> None:
        """What the next steps do not read."""
        for pattern in patterns:
            for path in self._work.glob(pattern):
                path.unlink()


def _unpack(job: tuple[Path, Path]) -> None:
    unpack(*job)
