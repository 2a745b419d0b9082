"""The features of an ensemble: what its members score, and terms that need no member."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rec_dist.evaluation.baselines import CandidateScorer, Floats, PartsScorer
from rec_dist.runtime.arrays import I32, I64

Term = Callable[[I64, I32, I32], npt.NDArray[np.float32]]  # training counts (I,), history, candidates (C,) -> (C,)


def _popularity(counts: I64, history: I32, candidates: I32) -> npt.NDArray[np.float32]:
    return np.log1p(counts[candidates]).astype(np.float32)


def _seen(counts: I64, history: I32, candidates: I32) -> npt.NDArray[np.float32]:
    return np.isin(candidates, history[:-1]).astype(np.float32)


def _last_item(counts: I64, history: I32, candidates: I32) -> npt.NDArray[np.float32]:
    return np.isin(candidates, history[-1:]).astype(np.float32)


_TERMS: Mapping[str, Term] = {"popularity": _popularity, "seen": _seen, "last_item": _last_item}


def parts_of(name: str, scorer: CandidateScorer, histories: Sequence[I32], candidates: Sequence[I32]) -> dict[str, list[Floats]]:
    """The features of the member `name`: its score, or its parts, by their names."""
    if isinstance(scorer, PartsScorer):
        return {f"{name}.{part}": scores for part, scores in scorer.score_parts(histories, candidates).items()}
    return {name: scorer.score(histories, candidates)}


def terms_of(terms: Sequence[str], counts: I64, histories: Sequence[I32], candidates: Sequence[I32]) -> dict[str, list[Floats]]:
    """The features of the terms, by their names."""
    pairs = list(zip(histories, candidates, strict=True))
    return {term: [_TERMS[term](counts, *pair).astype(np.float64) for pair in pairs] for term in terms}


def member_of(feature: str) -> str:
    """The member that a feature belongs to, or the term."""
    return feature.partition(".")[0]
