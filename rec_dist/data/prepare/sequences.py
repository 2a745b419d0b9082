"""From the rows of users to their sequences and splits: a pure function, of all users in memory or of those of a row range."""

import numpy as np
import pyarrow as pa

from rec_dist.config.schema import DataConfig
from rec_dist.data.prepare import rules
from rec_dist.data.prepare import splits as split_rules
from rec_dist.data.prepare.positives import Rows
from rec_dist.data.prepare.shards import Sequences
from rec_dist.data.prepare.splits import Split
from rec_dist.data.sources.interactions import Bool
from rec_dist.runtime.arrays import I64


def split_sequences(
    rows: Rows, raw_users: pa.Array, config: DataConfig, cuts: tuple[int, int] | None, cold: Bool | None
) -> tuple[Sequences, Split, I64]:
    """Cuts the rows of users 0..U-1 by data.split: (whole sequences, their split, a hash of each user (U,)).

    rows (N,): after the k-core, in time order. raw_users: Arrow strings (U,). cuts: the timestamps for global_temporal. cold (I,):
    items that the train and valid splits leave out; their cuts count no such item. Few-shot training is left to the caller.
    """
    positives = rows.take(rows.positive)
    offsets = np.searchsorted(positives.user, np.arange(len(raw_users) + 1)).astype(np.int64)
    hashes = split_rules.hash_names(raw_users.to_pylist())
    split = rules.split_users(config, positives.timestamp, offsets, hashes, cuts)
    negative_offsets, negatives = split_rules.training_explicit_negatives(rows, split)
    if cold is not None:
        split = split_rules.hold_out(split, offsets, ~cold[positives.item])
    sequences = Sequences(raw_users, offsets, positives.item, positives.timestamp, positives.rating, negative_offsets, negatives)
    return sequences, split, hashes
