"""A teacher's lists as soft targets: how the probability of the next item is shared among the items that the teacher ranks first.

    p_j = softmax_j(score_j / temperature) over the h items of the list

R listed targets, m targets of an example, h items of a list.
"""

import numpy as np

from rec_dist.data.artifacts.matrices import F32
from rec_dist.data.artifacts.scored_lists import ScoredLists
from rec_dist.data.dataset.prepared_data import SequenceSplit
from rec_dist.runtime.arrays import I32, I64


class SoftTargets:
    """The lists of the targets of a split, found by the targets' places in it. num_items: h. Cost: 8 bytes a listed target."""

    def __init__(self, scored: ScoredLists, split: SequenceSplit, temperature: float) -> None:
        self._lists, self._scores, self._temperature = scored.lists.items, scored.scores, temperature
        rows = np.searchsorted(split.user_ids, scored.lists.user_ids)
        self._places: I64 = split.offsets[rows] + scored.lists.positions  # (R,) ascending
        assert (np.diff(self._places) > 0).all() and (split.user_ids[rows] == scored.lists.user_ids).all(), (
            "lists of another split"
        )
        self.num_items = self._lists.shape[1]

    def __len__(self) -> int:
        return len(self._places)

    def none(self, num: int) -> tuple[I32, F32]:
        """Items and shares (num, h) of targets without a list: zeros."""
        return np.zeros((num, self.num_items), dtype=np.int32), np.zeros((num, self.num_items), dtype=np.float32)

    def of(self, start: int, stop: int) -> tuple[I32, F32]:
        """Items and shares (m, h) of the targets at places start..stop - 1 of the split's items. Without a list, shares are 0."""
        items, shares = self.none(stop - start)
        first, last = np.searchsorted(self._places, [start, stop])
        listed = self._lists[first:last]
        scores = np.where(listed >= 0, self._scores[first:last].astype(np.float64) / self._temperature, -np.inf)
        known = np.isfinite(scores.max(axis=1, initial=-np.inf))  # else nothing was left to recommend: as without a list
        if known.any():
            there, listed, scores = self._places[first:last][known] - start, listed[known], scores[known]
            odds = np.exp(scores - scores.max(axis=1, keepdims=True))
            items[there], shares[there] = listed.clip(min=0), odds / odds.sum(axis=1, keepdims=True)
        return items, shares
