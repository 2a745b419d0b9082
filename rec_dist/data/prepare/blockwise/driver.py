"""Runs the steps in order, and computes what spans all jobs: the catalogue, the k-core, the cuts, where users and shards begin.

    blocks of the source  --HashShuffle-->  hash partitions of users
    hash partitions       --OrderRows, CoreCount (a job per round), DescribeCore, ToRowRanges-->  row ranges
    row ranges            --SplitRange, Count, WriteShard-->  shards

This process holds the catalogue (about 0.5 KB per item) and counts in memory, but nothing per row or user. The work, in a folder
beside data.path or below its URI, takes about 150 bytes per row. `run_map` runs the jobs of a step, here or on a cluster.
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
from rec_dist.data.prepare.blockwise.hash_partitions import CoreCount, DescribeCore, OrderRows, ToRowRanges, times_file
from rec_dist.data.prepare.blockwise.hash_shuffle import HashShuffle, save_item_index, save_known, titles_file
from rec_dist.data.prepare.blockwise.row_ranges import Count, RangeReader, SplitRange, save_cold
from rec_dist.data.prepare.blockwise.scratch import Work, WorkFile, load_array, read_batch, save_array
from rec_dist.data.prepare.blockwise.selection import last_of_few_shot, nth_smallest
from rec_dist.data.prepare.blockwise.unpacking import plain_files
from rec_dist.data.prepare.blockwise.write_shards import WriteShard, index_file, shard_jobs
from rec_dist.data.prepare.jobs import Map
from rec_dist.data.prepare.outcome import Counts, Prepared
from rec_dist.data.prepare.positives import core_items
from rec_dist.data.prepare.shards import write_items
from rec_dist.data.prepare.titles import DistinctItems, make_distinct
from rec_dist.data.sources.interactions import Bool
from rec_dist.data.sources.source import Joined, Source
from rec_dist.runtime.arrays import I64

logger = logging.getLogger(__name__)

STEP = "prepare,"  # the log line of a step begins with this


@dataclass(frozen=True)
class Sizes:
    """The sizes of the pieces."""

    block_bytes: int = 1 << 25  # bytes of text per block
    partition_rows: int = 2_000_000  # rows per hash partition
    range_rows: int = 2_000_000  # rows per row range
    num_bins: int = 1 << 14  # equal stretches of the source; a row range is a run of them


def prepare_blockwise(source: Source, config: DataConfig, folder: Path, work: Work, run_map: Map, sizes: Sizes) -> Prepared:
    """Writes items and shards into `folder`, with intermediate files in `work`. Raises UserError as prepare_in_memory does.

    If `work` is below a URI, the jobs write the shards to that URI. `folder` then holds all other files.
    """
    run = _Run(config, work, run_map, sizes, folder.parent if work.is_remote else Path(work.place))
    shuffled = run.shuffle(source)
    distinct = run.make_titles(shuffled)
    core = run.reduce(shuffled, distinct)
    cuts = run.cut_times(core)
    ranges = run.to_row_ranges(core)
    alive = distinct.items.take(np.flatnonzero(core.alive))
    reader, rows, targets, train_count = run.split(core, ranges, cuts, save_cold(work, rules.cold_items(config, alive.raw)))
    jobs = shard_jobs(rows, config.num_shards)
    entries = list(run.each("write shards", WriteShard(reader, folder, config.cache_dir), jobs))
    splits = {}
    for name in SPLITS:
        index = write_index(folder, name, (read_batch(index_file(work, job)) for job in jobs if job.split == name))
        shards = [entry for job, entry in zip(jobs, entries, strict=True) if job.split == name]
        splits[name] = SplitEntry(int(rows[name][-1]), targets[name], shards, index)
    return Prepared(
        cuts={"valid_from": cuts[0] if cuts else None, "test_from": cuts[1] if cuts else None},
        counts=core.counts,
        bad_rows=shuffled.joined.bad.in_order(),
        notes=shuffled.joined.notes(),
        items=write_items(folder, alive, train_count),
        splits=splits,
    )


@dataclass(frozen=True)
class _Shuffled:
    """The source in hash partitions. first_rows (B+1,): rows before each block. used (I,): which items occur in any row."""

    joined: Joined
    first_rows: I64
    used: Bool
    num_partitions: int

    @property
    def num_rows(self) -> int:
        return int(self.first_rows[-1])


@dataclass(frozen=True)
class _Core:
    """What the k-core leaves. alive (I,): which items. The histograms count users and rows over bins of the source."""

    alive: Bool
    alive_file: WorkFile
    counts: Counts
    num_rows: int
    num_partitions: int
    user_histogram: I64
    row_histogram: I64


class _Run:
    """The steps. Each method runs all jobs of its steps."""

    def __init__(self, config: DataConfig, work: Work, run_map: Map, sizes: Sizes, folder: Path) -> None:
        self._config, self._work, self._map, self._sizes, self._folder = config, work, run_map, sizes, folder

    def each(self, step: str, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterable[Any]:
        """Runs a step and returns its results in the order of its jobs."""
        logger.info(f"{STEP} {step}: {len(jobs)} job{'s' if len(jobs) != 1 else ''}")
        return self._map(function, jobs)

    def shuffle(self, source: Source) -> _Shuffled:
        """Reads every block and distributes its rows over the hash partitions."""
        config, work = self._config, self._work
        files = plain_files(source.files, self._folder, work, self.each)
        blocks = [block for file in files for block in source.rows.cut(file, self._sizes.block_bytes)]
        num_partitions = max(-(-sum(source.rows.num_rows(file) for file in files) // self._sizes.partition_rows), 1)
        known = None
        if source.known is not None:
            known = work / "known.arrow"
            save_known(known, source.known)
        joined, num_rows, used = Joined(source), [0], [np.zeros(0, dtype=np.int64)]
        ratings = timestamps = True
        shuffle = HashShuffle(source.rows, known, work, num_partitions)
        for report in self.each("read", shuffle, list(enumerate(blocks))):
            save_item_index(work, report.index, joined.add(report.block, report.rows))
            num_rows.append(report.num_rows)
            used = [np.union1d(used[0], report.used)]
            ratings, timestamps = report.has_rating, report.has_timestamp
        joined.finish(config.max_bad_rows)
        for note in joined.notes():
            logger.info(note)
        rules.check_rows(config, sum(num_rows) - joined.num_untitled_rows, ratings=ratings, timestamps=timestamps)
        titled = np.array([bool(title) for title in joined.items.titles], dtype=bool)
        named = titled if source.items is None else np.isin(np.arange(len(titled)), used[0])
        return _Shuffled(joined, np.cumsum(num_rows, dtype=np.int64), named, num_partitions)

    def make_titles(self, shuffled: _Shuffled) -> DistinctItems:
        """Makes the titles of the items that occur in rows distinct."""
        distinct = make_distinct(shuffled.joined.items.take(np.flatnonzero(shuffled.used)), merge=self._config.merge_equal_titles)
        rules.say_titles(distinct)
        titles = np.full(len(shuffled.used), -1, dtype=np.int64)
        titles[shuffled.used] = distinct.new_index
        save_array(titles_file(self._work), titles)
        return distinct

    def reduce(self, shuffled: _Shuffled, distinct: DistinctItems) -> _Core:
        """Orders rows in time, drops repeats, and applies the k-core: rounds over all partitions until no item is dropped."""
        config, work, partitions = self._config, self._work, range(shuffled.num_partitions)
        ordered = list(
            self.each("order", OrderRows(work, shuffled.first_rows, config.min_rating, shuffled.joined.times.digits), partitions)
        )
        work.drop("rows-*", "unpacked-*")
        min_user, file, rounds = config.min_user_interactions, work / "alive.npy", 0

        def count(alive: Bool) -> I64:
            nonlocal file, rounds
            rounds += 1
            file = work / f"alive-{rounds}.npy"
            save_array(file, alive)
            positives = np.zeros(len(alive), dtype=np.int64)
            for items, counts in self.each(f"k-core, round {rounds}", CoreCount(work, min_user, file), partitions):
                positives[items] += counts
            return positives

        alive = core_items(len(distinct.items), config.min_item_interactions, count)  # what the last round was given too
        describe = DescribeCore(work, min_user, file, shuffled.num_rows, self._sizes.num_bins)
        facts = list(self.each("count", describe, partitions))
        num_positives, num_before = sum(f.positives for f in facts), sum(count for _, _, count in ordered)
        rules.check_core(config, num_before, num_positives)
        counts = Counts(
            raw_rows=sum(rows for rows, _, _ in ordered),
            repeated_rows=sum(repeats for _, repeats, _ in ordered),
            titles_with_year=distinct.num_with_year,
            merged_items=distinct.num_merged,
            core_dropped_positives=num_before - num_positives,
            users=sum(f.users for f in facts),
            items=int(alive.sum()),
            positives=num_positives,
            explicit_negatives=sum(f.explicit_negatives for f in facts),
            ties=sum(f.ties for f in facts),
            followers=sum(f.followers for f in facts),
        )
        rules.say_counts(counts)
        users, rows = sum(f.user_histogram for f in facts), sum(f.row_histogram for f in facts)
        assert isinstance(users, np.ndarray) and isinstance(rows, np.ndarray), "there is at least one partition"
        return _Core(alive, file, counts, shuffled.num_rows, shuffled.num_partitions, users, rows)

    def cut_times(self, core: _Core) -> tuple[int, int] | None:
        """The exact cuts of global_temporal, by bisection over the ordered timestamps of all partitions."""
        if self._config.split != "global_temporal":
            return None
        times = [load_array(times_file(self._work, partition)) for partition in range(core.num_partitions)]
        places = split_rules.cut_places(core.counts.positives, self._config.valid_fraction, self._config.test_fraction)
        valid_from, test_from = (nth_smallest(times, place) for place in places)
        return valid_from, test_from

    def to_row_ranges(self, core: _Core) -> I64:
        """Moves users to row ranges with about equal numbers of rows. Returns how many users come before each range (P+1,)."""
        rows = np.concatenate([[0], np.cumsum(core.row_histogram)])
        edges = [0]
        while edges[-1] < len(core.row_histogram):
            full = int(np.searchsorted(rows, rows[edges[-1]] + self._sizes.range_rows, side="right")) - 1
            edges.append(min(max(full, edges[-1] + 1), len(core.row_histogram)))
        step = ToRowRanges(
            self._work,
            self._config.min_user_interactions,
            core.alive_file,
            core.num_rows,
            self._sizes.num_bins,
            np.array(edges, dtype=np.int64),
        )
        list(self.each("gather row ranges", step, range(core.num_partitions)))
        self._work.drop("once-*", "users-*", "times-*")
        return np.concatenate([[0], np.cumsum(core.user_histogram)])[edges].astype(np.int64)

    def split(
        self, core: _Core, first_users: I64, cuts: tuple[int, int] | None, cold: WorkFile | None
    ) -> tuple[RangeReader, dict[str, I64], dict[str, int], I64]:
        """Splits every range: (their reader, rows of each split before each range (P+1,), targets by split, train_count (I,))."""
        config, indices = self._config, range(len(first_users) - 1)
        rules.say_split(config)
        lowest = list(self.each("split", SplitRange(self._work, core.num_partitions, first_users, config, cuts, cold), indices))
        self._work.drop("by-range-*")
        reader = RangeReader(self._work, first_users, last_of_few_shot(lowest, config.max_train_users), cold)
        facts = list(self.each("count targets", Count(reader), indices))
        rows = {name: np.cumsum([0, *(f.rows[name] for f in facts)], dtype=np.int64) for name in SPLITS}
        rules.check_split(config, {n: int(before[-1]) for n, before in rows.items()}, core.counts.positives, core.counts.users)
        train_count = np.zeros(core.counts.items, dtype=np.int64)
        for fact in facts:
            train_count[fact.train_items] += fact.train_counts
        return reader, rows, {name: sum(f.targets[name] for f in facts) for name in SPLITS}, train_count
