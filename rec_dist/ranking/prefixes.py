"""Training targets as users of a ranking: each is ranked for as if the user had come no further. No held-out item is among them.

Cost: 24 bytes a target, and 32 more while the targets are chosen.
"""

from collections.abc import Iterator

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.sampling.targets import index_targets
from rec_dist.ranking.users import UserBlock
from rec_dist.runtime.arrays import I64
from rec_dist.runtime.rng import hash_u64


class TrainingPrefixes:
    """Implements Users. "User" n is the history before the target at positions[n] of the user user_ids[n], in ascending order.

    max_targets: the most; each user's last target comes first, then each user's last but one, and so on. Of targets that are
    equally far from the end, those of users chosen by hash. None: all.
    """

    def __init__(self, data: PreparedData, max_targets: int | None) -> None:
        self._split = data.split("train")
        targets = index_targets(self._split, 1)
        rows, positions = targets.rows, targets.starts
        if max_targets is not None and max_targets < len(rows):
            from_end = np.diff(self._split.offsets)[rows] - positions
            order = np.lexsort((hash_u64(self._split.user_ids[rows]), from_end))
            kept = np.sort(order[:max_targets])
            rows, positions = rows[kept], positions[kept]
        self._rows = rows
        self.user_ids: I64 = self._split.user_ids[rows]
        self.positions: I64 = positions
        self.total = len(rows)
        self.identity = "all training targets" if max_targets is None else f"the last {max_targets} training targets"

    def blocks(self, size: int, start: int = 0) -> Iterator[UserBlock]:
        """As Users.blocks. A name is the number of the target."""
        for begin in range(start, self.total, size):
            chosen = range(begin, min(begin + size, self.total))
            yield UserBlock(
                [str(number) for number in chosen],
                [self._split.items_of(int(self._rows[number]))[: self.positions[number]] for number in chosen],
            )
