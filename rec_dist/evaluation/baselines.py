"""The floor rankers: what a language model must beat. A ranker gives each candidate of a history one score, higher is better.

C candidates of a history, I items of the catalogue.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rec_dist.runtime.arrays import I32, I64

Floats = npt.NDArray[np.float64]


class Ranker(Protocol):
    """Scores candidates after histories."""

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """histories[b] (n_b,) and candidates[b] (C_b,) item ids -> (C_b,) each."""
        ...


class PopularityRanker:
    """Scores by how often an item was chosen in the training part, the same for every history.

    Equal counts stay tied: the metrics rank a tie against the target, so a tie-break could only flatter this floor.
    """

    def __init__(self, train_counts: I64) -> None:
        self._counts = train_counts.astype(np.float64)  # (I,)

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """As Ranker.score."""
        check_lengths(histories, candidates)
        return [self._counts[items] for items in candidates]


def check_lengths(histories: Sequence[I32], candidates: Sequence[I32]) -> None:
    """ValueError unless there is one list of candidates for each history."""
    if len(histories) != len(candidates):
        raise ValueError(f"{len(histories)} histories and {len(candidates)} lists of candidates; give one list a history")
