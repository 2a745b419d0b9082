"""Cold and warm targets apart: a mean over both hides that items without training interactions are ranked at random.

Three groups by the training interactions of the target: none, and the lower and the upper half of the rest. A group is a finding if
its auc is significantly below that of the other targets and is not shown to be above 1/2, the auc of a random order.
"""

import numpy as np
import numpy.typing as npt

from rec_dist.auditing.check import FEWEST_USERS, Check, Outcome
from rec_dist.auditing.questions import Subject
from rec_dist.evaluation.bootstrap import bootstrap_interval
from rec_dist.evaluation.metrics import auc
from rec_dist.report.numbers import format_interval
from rec_dist.runtime.arrays import I64


def _groups(counts: I64) -> dict[str, npt.NDArray[np.bool_]]:
    """counts (N,): the training interactions of each target."""
    seen = counts > 0
    middle = int(np.median(counts[seen])) if seen.any() else 0
    return {
        "cold (no training interaction)": ~seen,
        f"rare (1 to {middle})": seen & (counts <= middle),
        f"frequent (more than {middle})": counts > middle,
    }


def _run(subject: Subject) -> Outcome:
    assert subject.data is not None
    groups = _groups(subject.data.train_counts[subject.questions.targets])
    shares = ", ".join(f"{name}: {int(inside.sum()):,}" for name, inside in groups.items() if inside.any())
    measured, faults = [f"Targets: {shares}."], []
    if subject.model is None:
        return Outcome(measured)
    values, users, seed = auc(subject.ranks, subject.questions.sizes), subject.questions.users, subject.seed
    for name, inside in groups.items():
        if len(np.unique(users[inside])) < FEWEST_USERS:
            continue
        group = bootstrap_interval(values[inside], seed=seed, users=users[inside])
        measured.append(f"{name}: auc {format_interval(group.to_dict())}.")
        if len(np.unique(users[~inside])) < FEWEST_USERS:
            continue
        rest = bootstrap_interval(values[~inside], seed=seed, users=users[~inside])
        if group.low <= 0.5 and group.high < rest.low:
            faults.append(f"Targets that are {name} are not shown to be ranked better than at random; report them apart.")
    return Outcome(measured, faults)


COLD = Check("cold", "Are cold targets ranked as well as warm ones?", "data", _run)
