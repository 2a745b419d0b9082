"""Splits: which part of a user's sequence trains, validates and tests. Pure functions on offsets; nothing is copied here.

A row of a split is a prefix of a user's sequence: items 0..length-1. Those from first_target on are targets, those before are
history. A target has at least one item of history, so first_target >= 1. A user without a target in a split has no row there.
Letters: U users, N positives, R rows of a split.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.prepare.positives import Rows
from rec_dist.data.sources.interactions import Bool
from rec_dist.runtime.arrays import I64
from rec_dist.runtime.rng import uniform

_SALT_RATIO, _SALT_FEW_SHOT, _SALT_COLD = 1, 2, 3


@dataclass(frozen=True)
class Cut:
    """Rows of one split: users (R,) ascending, length (R,) items of the prefix, first_target (R,)."""

    users: I64
    length: I64
    first_target: I64

    @property
    def num_targets(self) -> int:
        """The targets of all rows."""
        return int((self.length - self.first_target).sum())

    def part(self, rows: range) -> "Cut":
        """The cut of some consecutive rows."""
        return Cut(*(values[rows.start : rows.stop] for values in (self.users, self.length, self.first_target)))


@dataclass(frozen=True)
class Split:
    """The three cuts, and the times at which validation and test begin, if there are any.

    train_length (U,): how many of a user's first positives are the training part. trains (U,): False for users that are held out.
    """

    train: Cut
    valid: Cut
    test: Cut
    train_length: I64
    trains: Bool
    valid_from: int | None = None
    test_from: int | None = None


def _cut(length: I64, first_target: I64) -> Cut:
    """The rows of the users that have a target. length and first_target are (U,)."""
    first_target = np.maximum(first_target, 1)
    users = np.flatnonzero(length > first_target).astype(np.int64)
    return Cut(users, length[users], first_target[users])


def leave_one_out(lengths: I64) -> Split:
    """Tests on the last item of each user, validates on the one before, and trains on the rest. lengths (U,)."""
    train = np.maximum(lengths - 2, 0)
    return Split(
        train=_cut(train, np.ones_like(train)),
        valid=_cut(np.maximum(lengths - 1, 0), np.maximum(lengths - 2, 1)),
        test=_cut(lengths, np.maximum(lengths - 1, 1)),
        train_length=train,
        trains=np.ones(len(lengths), dtype=bool),
    )


def cut_places(count: int, valid_fraction: float, test_fraction: float) -> tuple[int, int]:
    """The places where validation and test begin, among `count` timestamps in ascending order."""
    return (
        min(round(count * (1.0 - test_fraction - valid_fraction)), count - 1),
        min(round(count * (1.0 - test_fraction)), count - 1),
    )


def global_temporal(timestamp: I64, offsets: I64, valid_from: int, test_from: int) -> Split:
    """Cuts all users at the same times: timestamp (N,) ordered within each user, offsets (U+1,).

    The cuts are the timestamps at the quantiles 1 - test - valid and 1 - test of all positives (cut_places). A row with the
    timestamp of a cut comes after it, so equal times are never on both sides. The history of a test row is everything before
    the cut, including the validation part.
    """
    before_valid = _count_before(timestamp, offsets, valid_from)
    before_test = _count_before(timestamp, offsets, test_from)
    return Split(
        train=_cut(before_valid, np.ones_like(before_valid)),
        valid=_cut(before_test, before_valid),
        test=_cut(np.diff(offsets), before_test),
        train_length=before_valid,
        trains=np.ones(len(offsets) - 1, dtype=bool),
        valid_from=valid_from,
        test_from=test_from,
    )


def _count_before(timestamp: I64, offsets: I64, moment: int) -> I64:
    """(U,): how many items of each user are earlier than `moment`."""
    total = offsets_of((timestamp < moment).astype(np.int64))
    counts: I64 = total[offsets[1:]] - total[offsets[:-1]]
    return counts


def user_ratio(lengths: I64, user_hashes: I64, valid_fraction: float, test_fraction: float) -> Split:
    """Assigns whole users to train, valid or test by hash. The last item of a held-out user is the target.

    lengths, user_hashes (U,).
    """
    draw = uniform(_SALT_RATIO, user_hashes)
    tests, valids = draw < test_fraction, (draw >= test_fraction) & (draw < test_fraction + valid_fraction)
    train = np.where(tests | valids, 0, lengths)
    last = np.maximum(lengths - 1, 1)
    return Split(
        train=_cut(train, np.ones_like(train)),
        valid=_cut(np.where(valids, lengths, 0), last),
        test=_cut(np.where(tests, lengths, 0), last),
        train_length=train,
        trains=~(tests | valids),
    )


def cold_items(raw_items: list[str], fraction: float) -> Bool:
    """(I,): which items are held out of the train and valid splits, by hash. More are held out for a larger fraction."""
    return uniform(_SALT_COLD, hash_names(raw_items)) < fraction


def hold_out(split: Split, offsets: I64, warm: Bool) -> Split:
    """The split whose train and valid cuts are of sequences without cold items. offsets, warm: as for without_cold()."""
    return replace(split, train=without_cold(split.train, offsets, warm), valid=without_cold(split.valid, offsets, warm))


def without_cold(cut: Cut, offsets: I64, warm: Bool) -> Cut:
    """The cut after the cold items are taken out of the sequences of users at offsets (U+1,): warm (N,) is False for them.

    A target that is left has an item before it; users without one have no row any more.
    """
    before = offsets_of(warm.astype(np.int64))  # (N+1,) warm items before each
    starts = offsets[cut.users]
    length = before[starts + cut.length] - before[starts]
    first_target = np.maximum(before[starts + cut.first_target] - before[starts], 1)
    kept = length > first_target
    return Cut(cut.users[kept], length[kept], first_target[kept])


def training_explicit_negatives(rows: Rows, split: Split) -> tuple[I64, I64]:
    """The explicit negatives of each user within the training part, in time order: (offsets (U+1,), items (E,)).

    rows: positives and explicit negatives of users 0..U-1 in time order. With a cut in time, the training part of all users
    ends there. Otherwise it ends for each user at the first positive that is held out.
    """
    num_users = len(split.train_length)
    if split.valid_from is not None:
        inside = rows.timestamp < split.valid_from
    else:
        positive_at = np.flatnonzero(rows.positive)
        first_positive = np.searchsorted(rows.user[positive_at], np.arange(num_users + 1))
        held_out = first_positive[:-1] + split.train_length
        row_end = np.searchsorted(rows.user, np.arange(num_users), side="right")
        some_held_out = held_out < first_positive[1:]
        end = np.where(some_held_out, np.append(positive_at, 0)[held_out], row_end)
        inside = np.arange(len(rows)) < np.where(split.trains, end, 0)[rows.user]
    kept = inside & ~rows.positive
    return offsets_of(np.bincount(rows.user[kept], minlength=num_users)), rows.item[kept]


def few_shot(train: Cut, user_hashes: I64, max_users: int | None) -> Cut:
    """Keeps the rows of the max_users users with the smallest hash. A larger max_users keeps all users of a smaller one."""
    if max_users is None or max_users >= len(train.users):
        return train
    kept = np.sort(np.argsort(few_shot_draw(user_hashes[train.users]), kind="stable")[:max_users])
    return Cut(train.users[kept], train.length[kept], train.first_target[kept])


def few_shot_draw(user_hashes: I64) -> npt.NDArray[np.float64]:
    """The numbers by which users (R,) are ordered for few-shot training."""
    return uniform(_SALT_FEW_SHOT, user_hashes)


def hash_names(names: list[str]) -> npt.NDArray[np.int64]:
    """A 64-bit hash (N,) of the name of each user or item, which depends on nothing else."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
