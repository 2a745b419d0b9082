"""Two stages within an ensemble: cheap members retrieve N items a question, and members that read titles score these alone.

    r_q(i) = sum over features f of cheap members and terms of v_f x_f(q, i)        v: learnt as the weights are, without the others
    x_m(q, i) = score_m(i) - the mean of score_m over the N items; 0 for an item that was not retrieved

The N items have the largest r_q outside the history. The loss is still a softmax over all items: among retrieved items alone, the
member that retrieved them would get a weight below its worth. An item that was not read counts as the average of those that were,
so being retrieved is no feature of its own, and a member that scores at random changes nothing but the order of the N.

Cost: N titles a question in place of the catalogue, whose places and scores are held. Cheap members that need no workers score
twice, block by block; the scores of others are held.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import Floats
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.ensemble.members import FeatureBlock, Member, feature_blocks, on_workers
from rec_dist.methods.method import Evaluation, Launch
from rec_dist.ranking.selection import best_of
from rec_dist.runtime.arrays import I32, I64

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Retrieval:
    """The first stage: num N, and weights (F,) of the features of cheap members and terms, by their names."""

    num: int
    features: list[str]
    weights: F64

    def places(self, features: Mapping[str, Sequence[Floats]], histories: Sequence[I32], candidates: Sequence[I32]) -> list[I64]:
        """The places among the candidates of what is retrieved for each history."""
        weighted = list(zip(self.features, self.weights.tolist(), strict=True))
        found = []
        for number, (history, items) in enumerate(zip(histories, candidates, strict=True)):
            scores = sum((weight * features[name][number] for name, weight in weighted), np.zeros(len(items)))
            found.append(best_places(scores, history, items, self.num))
        return found


def best_places(scores: Floats, history: I32, candidates: I32, num: int) -> I64:
    """The places of the num highest scores (C,) among candidates (C,) outside the history: (n,), n <= num, as in best_of."""
    unseen = np.flatnonzero(~np.isin(candidates, history))
    return unseen[best_of(candidates[unseen], scores[unseen], num)]


def spread(scores: Floats, places: I64, num_candidates: int) -> Floats:
    """The feature of all candidates (C,) from the scores (n,) of those at `places`."""
    feature = np.zeros(num_candidates)
    if len(places):
        feature[places] = scores - scores.mean()
    return feature


def two_stages(members: Sequence[Member], num: int | None) -> tuple[list[Member], list[Member]]:
    """(members that score all candidates, members that score what these retrieve). num: task.ensemble.rerank.

    Raises UserError if rerank has no effect, or nothing retrieves.
    """
    if num is None:
        return list(members), []
    reading = [member for member in members if member.scores_titles]
    cheap = [member for member in members if not member.scores_titles]
    if not reading:
        raise UserError(
            f"task.ensemble.rerank ({num}) has no effect: no member is a language model that scores titles; remove it"
        )
    if not cheap:
        raise UserError(
            f"task.ensemble.rerank ({num}) needs a member that retrieves; name one, such as task.ensemble.members.neighbours=RUN"
        )
    if inner := [member.name for member in reading if member.has_members]:
        raise UserError(
            f"task.ensemble.members.{inner[0]} is an ensemble that reads all titles; name its members here, or train it with "
            "task.ensemble.rerank"
        )
    return cheap, reading


def titles_read(members: Sequence[Member], num: int | None, num_candidates: int) -> int:
    """As Ranker.titles_read: the second of two stages reads what is retrieved. num: as in two_stages."""
    cheap, reading = two_stages(members, num)
    retrieved = num_candidates if num is None else min(num, num_candidates)
    stages = ((cheap, num_candidates), (reading, retrieved))
    return sum(member.titles_read(titles) for stage, titles in stages for member in stage)


@dataclass(frozen=True)
class Reading:
    """What members that read titles make of Q questions: places[q] (n_q,) among its candidates, and scores (n_q,) by feature."""

    places: list[I64]
    scores: dict[str, list[Floats]]

    def features(self, first: int, candidates: Sequence[I32]) -> dict[str, list[Floats]]:
        """Their features for the questions from `first` on, which have these candidates."""
        return {
            name: [spread(values[first + n], self.places[first + n], len(items)) for n, items in enumerate(candidates)]
            for name, values in self.scores.items()
        }

    def found(self, first: int, examples: Sequence[EvalExample]) -> F64:
        """(n,): 1 where the target of the questions from `first` on is among the items retrieved."""
        places = self.places[first : first + len(examples)]
        return np.asarray([float(e.target in e.candidates[own]) for e, own in zip(examples, places, strict=True)])


def read_titles(members: Sequence[Member], places: list[I64], evaluation: Evaluation, launch: Launch) -> Reading:
    """Lets the members score the candidates at places[q] (n_q,) of each question."""
    filled = [number for number, chosen in enumerate(places) if len(chosen)]
    examples = (evaluation.examples[number] for number in filled)
    asked = [replace(e, candidates=e.candidates[places[number]]) for number, e in zip(filled, examples, strict=True)]
    scores: dict[str, list[Floats]] = {}
    for member in members:
        given: dict[str, list[Floats]] = {member.name: []}
        if asked:
            with member.reading(replace(evaluation, examples=asked, own_examples=True), launch) as read:
                given = read(asked)
        for name, values in given.items():
            scores[name] = [np.empty(0) for _ in places]
            for number, value in zip(filled, values, strict=True):
                scores[name][number] = value
    return Reading(places, scores)


def staged_blocks(
    members: Sequence[Member], terms: Sequence[str], retrieval: Retrieval | None, evaluation: Evaluation, launch: Launch
) -> tuple[Iterator[FeatureBlock], Reading | None]:
    """feature_blocks(), in two stages if there is a retrieval, and what was read then."""
    cheap, reading = two_stages(members, None if retrieval is None else retrieval.num)
    blocks = feature_blocks(cheap, terms, evaluation, launch)
    if retrieval is None:
        return blocks, None
    held = list(blocks) if on_workers(cheap) else None  # else they are made again, which takes less memory
    places = [
        chosen
        for block, features in held or blocks
        for chosen in retrieval.places(features, [e.history for e in block], [e.candidates for e in block])
    ]
    read = read_titles(reading, places, evaluation, launch)
    again = iter(held) if held is not None else feature_blocks(cheap, terms, evaluation, launch)
    return _with_titles(again, read), read


def _with_titles(blocks: Iterator[FeatureBlock], read: Reading) -> Iterator[FeatureBlock]:
    first = 0
    for block, features in blocks:
        yield block, features | read.features(first, [e.candidates for e in block])
        first += len(block)
