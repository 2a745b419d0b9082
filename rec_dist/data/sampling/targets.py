"""The index of training examples: groups every target of a split into examples of up to t consecutive targets of one user.

Cost: three integers per example in memory.
"""

from dataclasses import dataclass

import numpy as np

from rec_dist.data.dataset.prepared_data import SequenceSplit
from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class TargetIndex:
    """Example u has the targets at positions starts[u] .. stops[u] - 1 of row rows[u]; all (U,) int64."""

    rows: I64
    starts: I64
    stops: I64

    def __len__(self) -> int:
        return len(self.rows)


def index_targets(split: SequenceSplit, targets_per_example: int) -> TargetIndex:
    """Cuts the targets of each row into runs of `targets_per_example`. The last run may be shorter; no target is dropped.

    A target has at least one item before it.
    """
    lengths = np.diff(split.offsets)
    first = np.maximum(split.first_target.astype(np.int64), 1)
    per_row = np.maximum(-(-(lengths - first) // targets_per_example), 0)
    rows = np.repeat(np.arange(len(lengths)), per_row)
    within = np.arange(len(rows)) - np.repeat(np.concatenate([[0], np.cumsum(per_row)])[:-1], per_row)
    starts = first[rows] + within * targets_per_example
    return TargetIndex(rows, starts, np.minimum(starts + targets_per_example, lengths[rows]))
