"""What scores the candidates of a history, higher being better: the protocols, and the popularity baseline.

C candidates of a history, I items of the catalogue.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from rec_dist.runtime.arrays import I32, I64

if TYPE_CHECKING:
    from rec_dist.models.prompt_cache import PromptCache

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
class MemberScorer(CandidateScorer, Protocol):
    """A scorer whose score is the sum of what its members add. members: their names, and those of terms that need no model."""

    @property
    def members(self) -> Sequence[str]: ...

    def score_members(self, histories: Sequence[I32], candidates: Sequence[I32]) -> dict[str, list[Floats]]:
        """What each member adds, in the order of `members`; total_of() makes score() of it."""
        ...


@runtime_checkable
class KeepsPrompts(CandidateScorer, Protocol):
    """A scorer with language models in it, which can keep keys and values of prompts between calls."""

    def keep_prompts(self, cache: "PromptCache") -> None:
        """Keeps them in `cache` from now on. Scores stay the same but for rounding. Raises UserError for a model that cannot."""
        ...


def total_of(members: Mapping[str, Sequence[Floats]]) -> list[Floats]:
    """The scores of each list of candidates from what MemberScorer.score_members gives."""
    return [np.asarray(np.sum(parts, axis=0)) for parts in zip(*members.values(), strict=True)]


def score_with_members(
    scorer: CandidateScorer, histories: Sequence[I32], candidates: Sequence[I32]
) -> tuple[list[Floats], dict[str, list[Floats]]]:
    """The scores of each list of candidates, and what each member adds to them, if the scorer has any."""
    if not isinstance(scorer, MemberScorer):
        return scorer.score(histories, candidates), {}
    members = scorer.score_members(histories, candidates)
    return total_of(members), members


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
