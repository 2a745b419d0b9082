"""Does the target stand in some places of its list more often than in others? A prompt that lists the candidates shows the place.

Places are counted from the front and from the back, so lists of different lengths whose target is always last are found too.
"""

import numpy as np

from rec_dist.auditing.chance import binomial_tail, percent, probability
from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import Subject


def _run(subject: Subject) -> Outcome:
    questions = subject.questions
    if questions.ranks_all:
        return Outcome(skipped="every item is ranked, in the order of the catalogue.")
    if subject.data is None:
        return Outcome(skipped="in preference rows the chosen completion stands first by the format.")
    sizes, num = questions.sizes, len(questions)
    places = [np.flatnonzero(items == t)[0] for items, t in zip(questions.candidates, questions.targets, strict=True)]
    front = np.asarray(places, dtype=np.int64)
    longest, found = int(sizes.max()), []
    for end, at in (("front", front), ("back", sizes - 1 - front)):
        counts = np.bincount(at, minlength=longest)
        for place in range(longest):
            rate = float(((place < sizes) / sizes).mean())
            found.append((binomial_tail(int(counts[place]), num, rate), end, place + 1, int(counts[place]) / num, rate))
    tail, end, place, share, rate = min(found)
    tail = min(1.0, tail * len(found))
    measured = (
        f"The target's most conspicuous place is number {place} from the {end}: {percent(share)} of {num:,} questions, by chance "
        f"{percent(rate)} ({probability(tail)} for {len(found)} places)."
    )
    fault = "The place of the target tells it; shuffle each list by a draw that does not know the target."
    return Outcome.of_tail(measured, fault, tail)


POSITION = Check("position", "Does the target's place in its list tell it?", "questions", _run)
