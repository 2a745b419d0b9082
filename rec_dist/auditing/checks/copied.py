"""Is the target's title in the history? Then copying answers the question, and a model that copies looks good.

A question with m candidates whose titles stand in its history has its target among them by chance with probability m / C. Titles
are equal if their letters and digits are, in any case.
"""

import re

import numpy as np

from rec_dist.auditing.chance import binomial_tail, percent, probability
from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import Subject

_WORD = re.compile(r"\w+")


def _run(subject: Subject) -> Outcome:
    assert subject.data is not None
    number: dict[str, int] = {}
    of_item = np.asarray(
        [number.setdefault(" ".join(_WORD.findall(title.casefold())) or title, len(number)) for title in subject.data.titles]
    )  # (I,) one number for each distinct title
    copied, expected, num = 0, 0.0, len(subject.examples)
    for example in subject.examples:
        shown = np.isin(of_item[example.candidates], of_item[example.history])  # (C,)
        copied += bool(shown[example.candidates == example.target][0])
        expected += float(shown.mean())
    tail = binomial_tail(copied, num, expected / num)
    measured = (
        f"The title of {copied:,} of {num:,} targets ({percent(copied / num)}) stands in the history before it; by chance "
        f"{percent(expected / num)} ({probability(tail)})."
    )
    way_out = "merge items of equal titles (data.merge_equal_titles), or leave repeated items out of the questions"
    return Outcome.of_tail(measured, f"Copying a title of the history answers these questions; {way_out}.", tail)


COPIED = Check("copied", "Does the history hold the target's title?", "data", _run)
