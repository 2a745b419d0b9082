"""Baselines that a language model must beat. Each scores the candidates of a history; higher is better.

C candidates of a history, I items of the catalogue.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from rec_dist.runtime.arrays import I32, I64

Floats = npt.NDArray[np.float64]


class CandidateScorer(Protocol):
    """Scores candidates for histories."""

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """histories[b] (n_b,) and candidates[b] (C_b,) are item ids -> (C_b,) scores each."""
        ...


@runtime_checkable
class PartsScorer(CandidateScorer, Protocol):
    """A scorer whose score has parts with scales of their own, which an ensemble weighs separately."""

    def score_parts(self, histories: Sequence[I32], candidates: Sequence[I32]) -> dict[str, list[Floats]]:
        """As score(), for each part by its name, which holds no dot."""
        ...


@runtime_checkable
class MembersScorer(CandidateScorer, Protocol):
    """A scorer whose score is the sum of what several members give."""

    def score_members(self, histories: Sequence[I32], candidates: Sequence[I32]) -> dict[str, list[Floats]]:
        """As score(), for each member by its name. The sum over the members is the score."""
        ...


class PopularityScorer:
    """Scores an item by its positives in the training part, the same for every history.

    Equal counts stay tied: the metrics count a tie against the target, so a tie-break could only flatter this baseline.
    """

    def __init__(self, train_counts: I64) -> None:
        self._counts = train_counts.astype(np.float64)  # (I,)

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """Scores as CandidateScorer.score does."""
        check_lengths(histories, candidates)
        return [self._counts[items] for items in candidates]


def check_lengths(histories: Sequence[I32], candidates: Sequence[I32]) -> None:
    """Raises ValueError unless there is one list of candidates per history."""
    if len(histories) != len(candidates):
        raise ValueError(f"{len(histories)} histories and {len(candidates)} lists of candidates; give one list per history")
