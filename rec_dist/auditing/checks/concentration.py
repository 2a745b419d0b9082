"""How much of the catalogue is recommended, and how evenly: coverage and the Gini coefficient of exposure.

Each audited user gets a list of LIST_LENGTH items without those of the history, or for a language model, which scores a catalogue
slowly, the best candidate of each question. The order of popularity gives the same users lists of the same length. A model whose
Gini coefficient is not shown to be below that of popularity recommends to everybody the same. The bootstrap draws lists.

U lists, I items of the catalogue.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from rec_dist.auditing.chance import LEVEL, percent
from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import Subject
from rec_dist.evaluation.baselines import CandidateScorer, Floats, PopularityScorer
from rec_dist.runtime.arrays import I32, I64
from rec_dist.runtime.rng import hash_u64

LIST_LENGTH, _MOST_LISTS, _RESAMPLES = 10, 1000, 400
_SCORES_AT_ONCE, _SAMPLE = 1 << 22, 4


def gini(exposure: I64) -> float:
    """The Gini coefficient of exposure (I,), how often each item is recommended: 0 if all are equal, near 1 for a single item.

        G = sum_i (2 i - I - 1) x_i / (I sum_i x_i)          x_1 <= ... <= x_I

    >>> gini(np.asarray([2, 2, 2])), gini(np.asarray([0, 0, 0, 8]))
    (0.0, 0.75)
    """
    size, ordered = len(exposure), np.sort(exposure)
    return float(((2 * np.arange(1, size + 1) - size - 1) * ordered).sum() / (size * max(ordered.sum(), 1)))


def _top_lists(subject: Subject, scorer: CandidateScorer, places: I64) -> Iterator[I32]:
    """The best items for each of the questions `places` by their whole catalogue."""
    assert subject.data is not None
    catalogue = np.arange(subject.data.num_items, dtype=np.int32)
    at_once = max(1, _SCORES_AT_ONCE // len(catalogue))
    for begin in range(0, len(places), at_once):
        histories = [subject.examples[place].history for place in places[begin : begin + at_once].tolist()]
        for history, scores in zip(histories, scorer.score(histories, [catalogue] * len(histories)), strict=True):
            order = np.lexsort((catalogue, -scores))
            yield order[~np.isin(order, history)][:LIST_LENGTH].astype(np.int32)


def _best_candidates(subject: Subject, scores: Sequence[Floats]) -> list[I32]:
    """The best candidate of each question, the smallest item among equals."""
    asked = [example.candidates for example in subject.examples]
    return [items[np.lexsort((items, -values))[:1]] for items, values in zip(asked, scores, strict=True)]


def _run(subject: Subject) -> Outcome:
    assert subject.data is not None and subject.model is not None
    popularity, num_items = PopularityScorer(subject.data.train_counts), subject.data.num_items
    if subject.model.slow:
        both = (subject.scores, subject.scored(popularity, subject.examples))
        own, by_popularity = (_best_candidates(subject, scores) for scores in both)
        what = "the best candidate"
    else:
        places = np.argsort(hash_u64(subject.seed, _SAMPLE, np.arange(len(subject.questions))), kind="stable")[:_MOST_LISTS]
        own, by_popularity = (list(_top_lists(subject, s, places)) for s in (subject.model.scorer, popularity))
        what = f"the best {LIST_LENGTH} items"
    if not any(map(len, own)):
        return Outcome(skipped="the histories hold the whole catalogue.")
    exposures = [np.bincount(np.concatenate(lists), minlength=num_items) for lists in (own, by_popularity)]
    drawn = np.random.default_rng(subject.seed).integers(0, len(own), size=(_RESAMPLES, len(own)))
    gaps = [_gini_of(own, rows, num_items) - _gini_of(by_popularity, rows, num_items) for rows in drawn]
    low, high = np.quantile(gaps, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    measured = (
        f"Of {num_items:,} items, {what} of {len(own):,} questions cover {percent(float((exposures[0] > 0).mean()))}, Gini "
        f"{gini(exposures[0]):.3f}; by popularity {percent(float((exposures[1] > 0).mean()))}, Gini {gini(exposures[1]):.3f} "
        f"(difference {gini(exposures[0]) - gini(exposures[1]):+.3f} [{low:+.3f}, {high:+.3f}])."
    )
    if high < 0:
        return Outcome([measured])
    return Outcome([measured], ["Recommendations are not shown to be spread wider than the order of popularity."])


def _gini_of(lists: list[I32], rows: I64, num_items: int) -> float:
    return gini(np.bincount(np.concatenate([lists[row] for row in rows.tolist()]), minlength=num_items))


CONCENTRATION = Check("concentration", "How much of the catalogue is recommended, and how evenly?", "model", _run, compares=True)
