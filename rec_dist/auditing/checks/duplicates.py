"""Is a question, its history and target in one piece, in the training part? Are users in splits where they must not be?

A whole question that some user's training row holds in the same order is an answer learnt by heart: a second account, or rows that
were copied. Short histories and series occur twice by chance. Two users at the same item a go on to the same next one with a
probability q(a) that all pairs of training rows at a tell. A question x_1 .. x_L is then expected n(x_1) q(x_1) .. q(x_{L-1}) times,
n being the training interactions of an item, which bounds the probability that it occurs; the sum over questions is what chance
explains. Rows that contradict their split are counted exactly.

Cost: a sort of the training items, and the length of a history for each place with the same two last items.
"""

import numpy as np

from rec_dist.auditing.chance import ALPHA, binomial_tail, percent, probability
from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import Subject
from rec_dist.data.dataset.prepared_data import SequenceSplit
from rec_dist.runtime.arrays import F64, I32, I64


class _Places:
    """Where each pair of neighbouring items stands in the training rows."""

    def __init__(self, split: SequenceSplit, num_items: int) -> None:
        self.items = split.take(np.arange(len(split)), np.diff(split.offsets))  # (N,)
        self._starts = np.repeat(split.offsets[:-1], np.diff(split.offsets))  # (N,) where the row of each item begins
        self._num_items = num_items
        ends = np.arange(1, len(self.items))
        ends = ends[self._starts[1:] < ends]  # an item with another of its row before it
        keys = self._keys(self.items[ends - 1], self.items[ends])
        order = np.argsort(keys, kind="stable")
        self._sorted, self._ends = keys[order], ends[order]
        self._counts = np.bincount(self.items, minlength=num_items)  # (I,)
        self._agreement = self._agreements()

    def _agreements(self) -> F64:
        """(I,) q(a) = sum_b n_ab (n_ab - 1) / (n_a (n_a - 1)); for an item that is followed only once, that of all items."""
        pairs, together = np.unique(self._sorted, return_counts=True)
        agreeing = np.bincount(pairs // self._num_items, weights=together * (together - 1.0), minlength=self._num_items)
        followed = np.bincount(pairs // self._num_items, weights=together, minlength=self._num_items)
        places = followed * (followed - 1)
        overall = agreeing.sum() / max(places.sum(), 1)
        agreement: F64 = np.where(places > 0, agreeing / np.maximum(places, 1), overall)
        return agreement

    def expected(self, sequence: I32) -> float:
        """A bound of the probability that the training rows hold `sequence` (L,) by chance."""
        return min(1.0, float(self._counts[sequence[0]] * self._agreement[sequence[:-1]].prod()))

    def _keys(self, before: I32, after: I32) -> I64:
        return before.astype(np.int64) * self._num_items + after

    def holds(self, sequence: I32) -> bool:
        """Whether a training row has the items of `sequence` (L,), at least two, one after another."""
        key = self._keys(sequence[-2:-1], sequence[-1:])
        begin, stop = np.searchsorted(self._sorted, key[0], "left"), np.searchsorted(self._sorted, key[0], "right")
        for end in self._ends[begin:stop].tolist():
            start = end + 1 - len(sequence)
            if start >= self._starts[end] and np.array_equal(self.items[start : end + 1], sequence):
                return True
        return False


def _run(subject: Subject) -> Outcome:
    assert subject.data is not None
    data, train = subject.data, subject.data.split("train")
    if not train.num_items:
        return Outcome(skipped="the train split has no user.")
    places, faults = _Places(train, data.num_items), []
    found = expected = 0.0
    whole = [np.append(e.history, e.target).astype(np.int32) for e in subject.examples if len(e.history)]
    for sequence in whole:
        found += places.holds(sequence)
        expected += places.expected(sequence)
    measured, tail = [], 1.0
    if whole:
        tail = binomial_tail(int(found), len(whole), expected / len(whole))
        measured.append(
            f"{int(found):,} of {len(whole):,} questions ({percent(found / len(whole))}) stand in a training row, history and "
            f"target in one piece; chance explains {expected:.3g} ({probability(tail)})."
        )
    if tail < ALPHA:
        faults.append("Training rows hold whole questions; remove the duplicates from the source and prepare again.")
    if subject.split is not None:
        faults += _contradictions(subject, train, data.split(subject.split))
    return Outcome(measured, faults)


def _contradictions(subject: Subject, train: SequenceSplit, asked: SequenceSplit) -> list[str]:
    """Users in two splits under user_ratio, and training rows that are no beginning of the user's history in the asked split."""
    assert subject.data is not None
    both, of_train, of_asked = np.intersect1d(train.user_ids, asked.user_ids, return_indices=True)
    if subject.data.manifest.settings.get("split") == "user_ratio" and len(both):
        return [f"{len(both):,} users are in the train split and in {asked.name}, which user_ratio keeps apart; prepare again."]
    wrong = 0
    for row, other in zip(of_train.tolist(), of_asked.tolist(), strict=True):
        items = train.items_of(row)
        history = asked.items_of(other)[: int(asked.first_target[other])]
        wrong += len(items) > len(history) or not np.array_equal(items, history[: len(items)])
    if not wrong:
        return []
    return [f"The training rows of {wrong:,} users reach into their targets of {asked.name}, or differ; prepare again."]


DUPLICATES = Check("duplicates", "Are questions or held-out users in the training part?", "data", _run)
