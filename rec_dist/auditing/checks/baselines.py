"""What do popularity and neighbours score on the same questions? Neither reads a prompt or trains for longer than seconds.

Two faults show here. Candidates that somebody else chose are a finding if a baseline does better on them than on a uniform draw
for the same targets: they were chosen to be easy. A model is a finding if it is not shown to beat each baseline. Differences are
paired over questions, with the bootstrap over users of evaluation/bootstrap.py.
"""

from dataclasses import replace

from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import Subject
from rec_dist.evaluation.bootstrap import Interval, bootstrap_interval, paired_difference
from rec_dist.evaluation.examples import Candidates, EvalExample
from rec_dist.evaluation.metrics import Floats, reciprocal_rank
from rec_dist.report.numbers import chance_level, format_interval

_METRIC = "mrr"  # it is defined for lists of any length


def _run(subject: Subject) -> Outcome:
    assert subject.data is not None
    if not subject.data.split("train").num_targets:
        return Outcome(skipped="the train split has no target to learn from.")
    users, seed = subject.questions.users, subject.seed
    sizes = subject.questions.sizes
    levels = [chance_level(_METRIC, int(size)) or 0.0 for size in sizes]
    measured, faults = [f"A random order has an expected {_METRIC} of {sum(levels) / len(levels):.3f}."], []
    drawn = _redrawn(subject) if subject.questions.given else None
    own = None if subject.model is None else reciprocal_rank(subject.ranks)
    for name, scorer in subject.baselines.items():
        value = reciprocal_rank(subject.ranks_by(scorer, subject.examples))
        measured.append(f"{name}: {_METRIC} {_text(bootstrap_interval(value, seed=seed, users=users))}.")
        if drawn is not None:
            easier = paired_difference(value, reciprocal_rank(subject.ranks_by(scorer, drawn)), seed=seed, users=users)
            measured.append(f"{name} on these candidates minus on a uniform draw: {_text(easier, signed=True)}.")
            if easier.low > 0:
                faults.append(f"The candidates are easier for {name} than a uniform draw; rank all items, or draw anew.")
        if own is not None:
            ahead = paired_difference(own, value, seed=seed, users=users)
            measured.append(f"The model minus {name}: {_text(ahead, signed=True)}.")
            if not ahead.low > 0:
                faults.append(f"The model is not shown to beat {name}, which costs seconds.")
    return Outcome(measured + _of_model(own, subject), faults)


def _of_model(own: Floats | None, subject: Subject) -> list[str]:
    if own is None:
        return []
    return [f"The model: {_METRIC} {_text(bootstrap_interval(own, seed=subject.seed, users=subject.questions.users))}."]


def _redrawn(subject: Subject) -> list[EvalExample] | None:
    """The examples with as many candidates from a uniform draw outside the history; None if the catalogue has too few."""
    assert subject.data is not None
    data, longest = subject.data, max(len(e.history) for e in subject.examples)
    if int(subject.questions.sizes.max()) + longest > data.num_items:
        return None
    draws = {
        size: Candidates(data.num_items, size, exclude_seen=True, seed=subject.seed)
        for size in set(subject.questions.sizes.tolist())
    }
    return [
        replace(e, candidates=draws[len(e.candidates)].of(e.user_id, e.position, e.target, e.history)) for e in subject.examples
    ]


def _text(interval: Interval, *, signed: bool = False) -> str:
    return format_interval(interval.to_dict(), signed=signed)


BASELINES = Check("baselines", "What do popularity and neighbours score on these questions?", "data", _run, compares=True)
