"""Do the candidates tell the target? A lookup answers questions without a model and without the history.

If candidates are drawn with a seed that depends on the target, as in S-DPO's released LastFM lists, a target brings the same
company wherever it is asked. The lookup takes each candidate in turn for the target, finds the other questions with that target,
and counts how many of its other candidates they share. It answers with the candidate whose company was seen most. Chance is what
the same lookup scores when the lists are dealt to the questions anew, which keeps how often each item is a target and a candidate.

Cost: N * C * (N / I) comparisons of C items, 0.5 s for 1,000 questions of 20 candidates; NUM_DEALS + 1 times that.
"""

from collections.abc import Sequence

import numpy as np

from rec_dist.auditing.chance import ALPHA, binomial_tail, percent, probability
from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import Subject
from rec_dist.runtime.arrays import I32, I64
from rec_dist.runtime.rng import hash_u64

NUM_DEALS = 5  # the rate of chance comes from NUM_DEALS * N answers
_MOST_QUESTIONS, _MOST_CANDIDATES = 4000, 200  # a minute at most
_SAMPLE, _DEAL = 1, 2


def lookup_hits(targets: I32, lists: Sequence[I32]) -> int:
    """How many questions the lookup answers; one whose best candidates tie counts as not answered. lists[n] include targets[n]."""
    width = max(len(items) for items in lists)
    table = np.full((len(lists), width), -1, dtype=np.int32)  # (N, C)
    for row, items in enumerate(lists):
        table[row, : len(items)] = items
    asked: dict[int, list[int]] = {}
    for number, target in enumerate(targets.tolist()):
        asked.setdefault(target, []).append(number)
    hits = 0
    for number, (target, items) in enumerate(zip(targets.tolist(), lists, strict=True)):
        scores = [_company(number, item, items, asked, table) for item in items.tolist()]
        best = max(scores)
        hits += best > 0 and scores.count(best) == 1 and int(items[scores.index(best)]) == target
    return hits


def _company(number: int, item: int, items: I32, asked: dict[int, list[int]], table: I32) -> int:
    """The most candidates besides `item` that another question with the target `item` shares with `items`."""
    others = [other for other in asked.get(item, []) if other != number]
    if not others:
        return 0
    return int(np.isin(table[others], items[items != item]).sum(axis=1).max())


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
    if tail >= ALPHA:
        return Outcome([measured])
    fault = "The candidates tell the target; draw them by user and position, never by target, and evaluate again."
    return Outcome([measured], [fault])


CANDIDATES = Check("candidates", "Do the candidates alone tell the target?", "questions", _run)
