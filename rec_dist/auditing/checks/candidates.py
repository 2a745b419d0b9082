"""Do the candidates tell the target? A lookup answers questions without a model and without the history.

If candidates are drawn with a seed that depends on the target, as in S-DPO's released LastFM lists, a target brings the same
company wherever it is asked. The lookup takes each candidate in turn for the target, finds the other questions with that target,
and counts how many of its other candidates they share. It answers with the candidate whose company was seen most. Chance is what
the same lookup scores when the lists are dealt to the questions anew, which keeps how often each item is a target and a candidate.

Cost: NUM_DEALS + 1 times N * C * (N / I) look-ups of C items.
"""

from collections.abc import Sequence

import numpy as np

from rec_dist.auditing.chance import binomial_tail, percent, probability
from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import Subject
from rec_dist.data.dataset.ragged import runs
from rec_dist.runtime.arrays import I32, I64
from rec_dist.runtime.rng import hash_u64

NUM_DEALS = 5  # the rate of chance comes from NUM_DEALS * N answers
_MOST_QUESTIONS, _MOST_CANDIDATES = 4000, 200  # a minute at most
_SAMPLE, _DEAL = 1, 2


def lookup_hits(targets: I32, lists: Sequence[I32]) -> int:
    """How many questions the lookup answers; one whose best candidates tie counts as not answered. lists[n] include targets[n]."""
    sizes = np.asarray([len(items) for items in lists])
    num_ids = int(max(items.max() for items in lists)) + 1
    table = np.full((len(lists), int(sizes.max())), num_ids, dtype=np.int32)  # (N, C), filled up with an id of nothing
    table[np.arange(table.shape[1]) < sizes[:, None]] = np.concatenate(lists)
    asked = np.argsort(targets, kind="stable")  # questions by target
    first = np.searchsorted(targets[asked], np.arange(num_ids + 1))
    inside, hits = np.zeros(num_ids + 1, dtype=bool), 0
    for number, items in enumerate(lists):
        counts = first[items + 1] - first[items]
        others, owners = asked[runs(first[items], counts)], np.repeat(np.arange(len(items)), counts)
        inside[items] = True
        company = inside[table[others]].sum(axis=1) - 1  # without the target that they share
        inside[items] = False
        company[others == number] = 0
        best = np.zeros(len(items), dtype=np.int64)
        np.maximum.at(best, owners, company)
        winners = items[best == best.max()]
        hits += int(best.max() > 0 and len(winners) == 1 and winners[0] == targets[number])
    return hits


def dealt_lists(targets: I32, lists: Sequence[I32], order: I64) -> list[I32]:
    """Question n keeps its target and gets the other candidates of question order[n]."""
    negatives = [items[items != target] for target, items in zip(targets, lists, strict=True)]
    given = [negatives[place][negatives[place] != target] for place, target in zip(order, targets, strict=True)]
    return [np.append(items, target).astype(np.int32) for items, target in zip(given, targets, strict=True)]


def _run(subject: Subject) -> Outcome:
    questions, seed = subject.questions, subject.seed
    if questions.ranks_all:
        return Outcome(skipped="every item is ranked, so no candidates were chosen.")
    if (longest := int(questions.sizes.max())) > _MOST_CANDIDATES:
        return Outcome(skipped=f"lists of {longest} candidates would take too long (the limit is {_MOST_CANDIDATES}).")
    kept = np.argsort(hash_u64(seed, _SAMPLE, np.arange(len(questions))), kind="stable")[:_MOST_QUESTIONS]
    targets, lists = questions.targets[kept], [questions.candidates[place] for place in kept.tolist()]
    hits, num = lookup_hits(targets, lists), len(kept)
    orders = [np.argsort(hash_u64(seed, _DEAL, deal, np.arange(num)), kind="stable") for deal in range(NUM_DEALS)]
    by_chance = sum(lookup_hits(targets, dealt_lists(targets, lists, order)) for order in orders)
    rate = (by_chance + 1) / (NUM_DEALS * num + 1)  # never 0, which no sample could show
    tail = binomial_tail(hits, num, rate)
    measured = (
        f"A lookup that sees neither model nor history answers {percent(hits / num)} of {num:,} questions; with lists dealt anew "
        f"{percent(rate)} ({probability(tail)})."
    )
    fault = "The candidates tell the target; draw them by user and position, never by target, and evaluate again."
    return Outcome.of_tail(measured, fault, tail)


CANDIDATES = Check("candidates", "Do the candidates alone tell the target?", "questions", _run)
