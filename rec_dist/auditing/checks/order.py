"""How far do the model's scores move when the recent history is shuffled? A model that claims to read a sequence should lose.

Shuffles the last items of each history, as many as a prompt shows, so that no item enters or leaves what the model reads. The
finding is that the loss of mrr is not shown to be above 0. Needs the model once more for each question.
"""

from dataclasses import replace

import numpy as np

from rec_dist.auditing.chance import percent
from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import Subject
from rec_dist.evaluation.bootstrap import paired_difference
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.measure import ranks_of
from rec_dist.evaluation.metrics import reciprocal_rank
from rec_dist.report.numbers import format_interval
from rec_dist.runtime.rng import hash_u64

_ORDER = 3


def _shuffled(example: EvalExample, window: int, seed: int) -> EvalExample:
    begin = max(0, len(example.history) - window)
    keys = hash_u64(seed, _ORDER, example.user_id, example.position, np.arange(len(example.history) - begin))
    recent = example.history[begin:][np.argsort(keys, kind="stable")]
    return replace(example, history=np.concatenate([example.history[:begin], recent]))


def _run(subject: Subject) -> Outcome:
    assert subject.model is not None
    kept = [place for place, example in enumerate(subject.examples) if len(example.history) > 1]
    if not kept:
        return Outcome(skipped="no question has two items in its history.")
    examples = [_shuffled(subject.examples[place], subject.model.window, subject.seed) for place in kept]
    before = [subject.scores[place] for place in kept]
    after = subject.scored(subject.model.scorer, examples)
    users = subject.questions.users[kept]
    lost = paired_difference(
        reciprocal_rank(subject.ranks[kept]),
        reciprocal_rank(ranks_of(examples, after)),
        seed=subject.seed,
        users=users,
    )
    moved = np.mean([float(np.abs(a - b).mean() / max(float(b.std()), 1e-12)) for a, b in zip(after, before, strict=True)])
    other = np.mean([int(a.argmax() != b.argmax()) for a, b in zip(after, before, strict=True)])
    measured = (
        f"Shuffling the last {subject.model.window} items of {len(kept):,} histories costs mrr "
        f"{format_interval(lost.to_dict(), signed=True)}; a score moves by {moved:.2f} standard deviations of its list, and "
        f"{percent(float(other))} of first places change."
    )
    if lost.low > 0:
        return Outcome([measured])
    return Outcome([measured], ["The order of the history makes no significant difference to this model's ranking."])


ORDER = Check("order", "How far do scores move when the history is shuffled?", "model", _run, compares=True)
