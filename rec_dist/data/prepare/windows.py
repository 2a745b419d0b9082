"""Prepares a benchmark whose files hold windows: rows of a history of at most W items and its target, several rows a user.

The rows of a user are stitched to sequences, so that each interaction is stored once and every target is asked once:

    A row continues its user's latest sequence if its history is the end of that sequence: all of it, or its last W items. Then its
    target is appended. Any other row begins a sequence of its own.

W is the longest history in the files. A user's first sequence trains at every position after its first item, the items of its
first history included. In later sequences the history is context only, since other rows may have trained on it. Nothing is
dropped: no k-core, no repeats removed, and the catalogue is the whole file of titles.

The order of the rows is time; the one timestamp that BEAR gives a row is ignored. data.split=user_ratio holds out users, drawn by
hash; their targets are those of their rows. data.split=global_temporal holds out the last rows: row n (from 1) has the time n, and
what lies before a sequence's first target the time 0, since an interaction within the files' period has a row of its own.
S sequences, N items of all of them. Cost: the rows in memory.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import SplitEntry
from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.dataset.schema import SPLITS
from rec_dist.data.prepare import rules
from rec_dist.data.prepare import splits as split_rules
from rec_dist.data.prepare.shards import Sequences, prefix_index, write_items, write_split
from rec_dist.data.prepare.splits import Cut
from rec_dist.data.prepare.titles import make_distinct
from rec_dist.data.sources import FileSet
from rec_dist.data.sources.benchmarks import BENCHMARKS, read_benchmark_items
from rec_dist.data.sources.history_rows import read_history_rows
from rec_dist.data.sources.interactions import BadRows, Bool
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I64
from rec_dist.storage.checksums import FileEntry

logger = logging.getLogger(__name__)

# Keys of the section data that would change the benchmark, or need what its files lack.
_WITHOUT_EFFECT = ("min_rating", "min_user_interactions", "min_item_interactions", "columns", "prepare_on")


@dataclass(frozen=True)
class PreparedWindows:
    """The manifest's fields about a benchmark, whose files are on disk already."""

    cuts: dict[str, int | None]
    counts: dict[str, int]
    bad_rows: dict[str, int]
    notes: list[str]
    items: FileEntry
    splits: dict[str, SplitEntry]


@dataclass(frozen=True)
class Stitched:
    """Sequences (S,) in the order of their first rows. users[s]: whose it is. items[s]: its items, oldest first.

    times[s]: of these items. first_target[s]: the position of its first row's target. is_first[s]: whether it is the first sequence
    of its user.
    """

    users: list[str]
    items: list[list[int]]
    times: list[list[int]]
    first_target: I64
    is_first: list[bool]


def stitch(rows: Iterable[tuple[str, list[int], int]], longest: int) -> Stitched:
    """Joins rows of (user, history, target) to sequences, by the rule above. longest: W.

    >>> rows = [("a", [1], 2), ("b", [7, 8], 9), ("a", [1, 2], 3), ("a", [2, 3], 4), ("a", [9], 4)]
    >>> stitch(rows, longest=2).items
    [[1, 2, 3, 4], [7, 8, 9], [9, 4]]
    """
    latest: dict[str, int] = {}
    users: list[str] = []
    items: list[list[int]] = []
    times: list[list[int]] = []
    first_target: list[int] = []
    is_first: list[bool] = []
    for time, (user, history, target) in enumerate(rows, start=1):
        place = latest.get(user)
        if place is not None and items[place][-longest:] == history:
            items[place].append(target)
            times[place].append(time)
            continue
        is_first.append(place is None)
        latest[user] = len(items)
        users.append(user)
        items.append([*history, target])
        times.append([0] * len(history) + [time])
        first_target.append(len(history))
    return Stitched(users, items, times, np.array(first_target, dtype=np.int64), is_first)


def prepare_windows(found: FileSet, config: DataConfig, folder: Path) -> PreparedWindows:
    """Writes items and shards of sequences into `folder`. found.files: the titles, then the files of rows in the order of time.

    Raises UserError for a setting that does not fit, no usable row, more than data.max_bad_rows bad ones, or an empty split.
    """
    _check_settings(config)
    bad = BadRows()
    notes: list[str] = []
    table = read_benchmark_items(found.files[0], found.format, bad, notes, clean_text=config.clean_text)
    distinct = make_distinct(table, merge=config.merge_equal_titles)
    rules.say_titles(distinct)
    place = dict(zip(table.raw, distinct.new_index.tolist(), strict=True))
    rows = _rows(found, place, bad)
    bad.check(config.max_bad_rows)
    if not rows:
        raise UserError(f"data.source ({config.source}) holds no readable row; correct the file. {bad.describe()}")
    longest = max(len(history) for _, history, _ in rows)
    stitched = stitch(rows, longest)
    counts = _counts(stitched, len(rows)) | {
        "items": len(distinct.items),
        "merged_items": distinct.num_merged,
        "equal_titles": distinct.num_equal,
    }
    notes += [
        f"{counts['stitched_rows']} of {len(rows)} rows continue a sequence of their user (histories of at most {longest} items), "
        f"{counts['own_rows']} begin a further one",
        *bad.notes(),
    ]
    for note in notes:
        logger.info(note)
    sequences = _sequences(stitched)
    cold = rules.cold_items(config, distinct.items.raw)
    known = sequences if cold is None else sequences.without(cold)  # what the train and valid splits hold
    moments = _moments(len(rows), config) if config.split == "global_temporal" else None
    cuts = _cuts(stitched, sequences, config, cold, moments)
    rules.check_split(config, {name: len(cut.users) for name, cut in cuts.items()}, counts["positives"], counts["users"])
    trained = prefix_index(known.offsets, cuts["train"].users, cuts["train"].length)
    train_count = np.bincount(known.item[trained], minlength=len(distinct.items)).astype(np.int64)
    return PreparedWindows(
        cuts={} if moments is None else {"valid_from": moments[0], "test_from": moments[1]},
        counts=counts,
        bad_rows=bad.in_order(),
        notes=notes,
        items=write_items(folder, distinct.items, train_count),
        splits={
            name: write_split(folder, name, cuts[name], sequences if name == "test" else known, config.num_shards)
            for name in SPLITS
        },
    )


def _check_settings(config: DataConfig) -> None:
    for name in _WITHOUT_EFFECT:
        if getattr(config, name) != DataConfig.model_fields[name].get_default(call_default_factory=True):
            raise UserError(
                f"data.{name} has no effect on data.format={config.format}, whose rows are kept as they are; remove it."
            )
    if config.split == "leave_one_out":
        raise UserError(
            f"data.split (leave_one_out) would cut the rows of data.format={config.format}, which have their own test file; with "
            "data.test_fraction=0, set data.split=user_ratio to hold out users for validation, or global_temporal for the last rows."
        )


def _rows(found: FileSet, place: dict[str, int], bad: BadRows) -> list[tuple[str, list[int], int]]:
    """(user, history, target) of each usable row of all files. Adds the others to `bad`."""
    rows = []
    for number, path in enumerate(found.files[1:], start=1):
        bad.file = number
        for row in read_history_rows(path, bad, [BENCHMARKS[found.format]]):
            names = [*row.history, row.target]
            items = [place.get(name, -1) for name in names]
            if min(items) < 0:
                unknown = names[items.index(-1)]
                bad.add(f"item is not in {found.files[0].name}", path, np.array([row.line]), unknown)
                continue
            rows.append((row.user, items[:-1], items[-1]))
    return rows


def _counts(stitched: Stitched, num_rows: int) -> dict[str, int]:
    num_users = sum(stitched.is_first)
    return {
        "raw_rows": num_rows,
        "stitched_rows": num_rows - len(stitched.users),
        "own_rows": len(stitched.users) - num_users,
        "users": num_users,
        "positives": sum(map(len, stitched.items)),
    }


def _sequences(stitched: Stitched) -> Sequences:
    lengths = np.array([len(items) for items in stitched.items], dtype=np.int64)
    offsets = offsets_of(lengths)
    return Sequences(
        raw_users=pa.array(stitched.users, pa.string()),
        offsets=offsets,
        item=np.concatenate([np.array(items, dtype=np.int64) for items in stitched.items]),
        timestamp=np.concatenate([np.array(times, dtype=np.int64) for times in stitched.times]),
        rating=None,
        explicit_negative_offsets=np.zeros(len(lengths) + 1, dtype=np.int64),
        explicit_negatives=np.zeros(0, dtype=np.int64),
    )


def _moments(num_rows: int, config: DataConfig) -> tuple[int, int]:
    """The rows, from 1, at which validation and test begin; num_rows + 1 for a part that is not asked for."""
    test = round(num_rows * (1.0 - config.test_fraction))
    return min(test, round(num_rows * (1.0 - config.test_fraction - config.valid_fraction))) + 1, test + 1


def _cuts(
    stitched: Stitched, sequences: Sequences, config: DataConfig, cold: Bool | None, moments: tuple[int, int] | None
) -> dict[str, Cut]:
    """The rows of each split; those of train and valid count no cold item (I,). moments: None holds out users, with all sequences."""
    hashes = split_rules.hash_names(stitched.users)
    if moments is not None:
        split = split_rules.global_temporal(sequences.timestamp, sequences.offsets, *moments)
    else:
        split = split_rules.user_ratio(np.diff(sequences.offsets), hashes, config.valid_fraction, config.test_fraction)
        split = replace(split, valid=_from_first(split.valid), test=_from_first(split.test))
    of_rows = stitched.first_target
    trained = np.where(stitched.is_first, 1, of_rows)
    split = replace(
        split,
        train=_with_targets(split.train, trained),
        valid=_with_targets(split.valid, of_rows),
        test=_with_targets(split.test, of_rows),
    )
    if cold is not None:
        split = split_rules.hold_out(split, sequences.offsets, ~cold[sequences.item])
    train = split_rules.few_shot(split.train, hashes, config.max_train_users)
    return {"train": train, "valid": split.valid, "test": split.test}


def _from_first(cut: Cut) -> Cut:
    """The cut with every item but a sequence's first as a target."""
    return replace(cut, first_target=np.ones_like(cut.first_target))


def _with_targets(cut: Cut, first_target: I64) -> Cut:
    """The cut without targets before first_target (S,), and without the sequences that then have none."""
    later = np.maximum(cut.first_target, first_target[cut.users])
    kept = cut.length > later
    return Cut(cut.users[kept], cut.length[kept], later[kept])
