"""Checks and log lines of `prepare` that the in-memory and the blockwise way share."""

import logging

import numpy as np

from rec_dist.config.schema import DataConfig
from rec_dist.data.prepare import splits as split_rules
from rec_dist.data.prepare.outcome import Counts
from rec_dist.data.prepare.splits import Split
from rec_dist.data.prepare.titles import DistinctItems
from rec_dist.data.sources.interactions import Bool
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I64

logger = logging.getLogger(__name__)


_WAY_OUT = {
    "leave_one_out": "it needs users with at least 4 positives, so lower data.min_rating or choose another data.split",
    "global_temporal": "change data.valid_fraction or data.test_fraction, or choose user_ratio if most timestamps are equal",
    "user_ratio": "raise data.valid_fraction or data.test_fraction, or add more users",
}


def check_rows(config: DataConfig, num_rows: int, *, ratings: bool, timestamps: bool) -> None:
    """Raises UserError if the source lacks what the settings need."""
    if num_rows == 0:
        raise UserError(f"data.source ({config.source}) holds no readable row; correct the file.")
    if config.min_rating is not None and not ratings:
        raise UserError(f"data.min_rating ({config.min_rating}) needs ratings, and data.source has none; remove it.")
    if config.split == "global_temporal" and not timestamps:
        raise UserError(
            "data.split=global_temporal needs timestamps, and data.source has none; choose user_ratio or leave_one_out."
        )
    if not timestamps:
        logger.info("the source has no timestamps: the order of its rows serves as time, and row numbers replace timestamps")


def say_titles(distinct: DistinctItems) -> None:
    """Logs how titles became distinct."""
    if distinct.num_with_year or distinct.num_merged:
        example = f", for example {distinct.example_merged}" if distinct.num_merged else ""
        logger.info(
            f"titles: {distinct.num_with_year} got a year to be distinct, {distinct.num_merged} items were merged{example}"
        )
    if distinct.num_equal:
        logger.info(
            f"titles: {distinct.num_equal} items have a title that another item has too; a language model gives them equal scores"
        )


def check_core(config: DataConfig, before: int, after: int) -> None:
    """Raises UserError if the k-core leaves none of `before` positives."""
    if not after:
        raise UserError(
            f"data.source ({config.source}): none of {before} positives is left after data.min_rating ({config.min_rating}), "
            f"data.min_user_interactions ({config.min_user_interactions}) and data.min_item_interactions "
            f"({config.min_item_interactions}); lower them."
        )


def say_counts(counts: Counts) -> None:
    """Logs all counts, and what ties mean."""
    logger.info(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.for_manifest().items()))
    if counts.ties:
        logger.info(
            f"{counts.tie_share:.1%} of the positives have the same timestamp as the user's previous positive; the order of the "
            "source file decides between them"
        )


def say_split(config: DataConfig) -> None:
    """Logs which leaks a split does not prevent."""
    if config.split == "leave_one_out":
        logger.warning(
            "leave_one_out leaks: models train on positives that are later than other users' test positives; "
            "data.split=global_temporal does not leak"
        )
    elif config.split == "user_ratio":
        logger.info("note: user_ratio holds out users, not time: training positives may be later than a test positive")


def split_users(config: DataConfig, timestamp: I64, offsets: I64, hashes: I64, cuts: tuple[int, int] | None) -> Split:
    """Cuts positives (N,) of users at offsets (U+1,) by data.split. cuts: the timestamps for global_temporal."""
    if config.split == "leave_one_out":
        return split_rules.leave_one_out(np.diff(offsets))
    if config.split == "user_ratio":
        return split_rules.user_ratio(np.diff(offsets), hashes, config.valid_fraction, config.test_fraction)
    assert cuts is not None, "global_temporal needs its cuts"
    return split_rules.global_temporal(timestamp, offsets, *cuts)


def cold_items(config: DataConfig, raw_items: list[str]) -> Bool | None:
    """(I,): the items that data.cold_items_fraction holds out, None without any. Logs how many."""
    if not config.cold_items_fraction:
        return None
    cold = split_rules.cold_items(raw_items, config.cold_items_fraction)
    logger.info(
        f"cold items: {int(cold.sum())} of {len(cold)} are in no history and no target of the train and valid splits "
        "(data.cold_items_fraction)"
    )
    return cold


def check_split(config: DataConfig, rows: dict[str, int], positives: int, users: int) -> None:
    """Raises UserError if a requested split has no row."""
    for name, count in rows.items():
        fraction = {"valid": config.valid_fraction, "test": config.test_fraction}.get(name, 1.0)
        asked = config.split == "leave_one_out" or fraction > 0
        if asked and count == 0:
            raise UserError(
                f"data.split ({config.split}) leaves the {name} split without a target: too few of the "
                f"{positives} positives of {users} users fall into it; {_WAY_OUT[config.split]}."
            )
