"""The features of an ensemble: what its members score, and terms that need no member."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.ensemble.members import Member
from rec_dist.methods.ensemble.weights import F32
from rec_dist.methods.method import Evaluation, Launch, Scores

Term = Callable[[PreparedData, EvalExample], F32]  # -> (C,) in the order of the candidates


def _popularity(data: PreparedData, example: EvalExample) -> F32:
    return np.log1p(data.train_counts[example.candidates]).astype(np.float32)


def _seen(data: PreparedData, example: EvalExample) -> F32:
    return np.isin(example.candidates, example.history[:-1]).astype(np.float32)


def _last_item(data: PreparedData, example: EvalExample) -> F32:
    return np.isin(example.candidates, example.history[-1:]).astype(np.float32)


_TERMS: Mapping[str, Term] = {"popularity": _popularity, "seen": _seen, "last_item": _last_item}


def features_of(members: Sequence[Member], terms: Sequence[str], evaluation: Evaluation, launch: Launch) -> dict[str, Scores]:
    """Each feature by its name: (C_u,) for every example, in the order of its candidates."""
    features: dict[str, Scores] = {}
    for member in members:
        features |= member.parts(evaluation, launch)
    for term in terms:
        features[term] = [_TERMS[term](evaluation.data, example) for example in evaluation.examples]
    return features


def member_of(feature: str) -> str:
    """The member that a feature belongs to, or the term."""
    return feature.partition(".")[0]
