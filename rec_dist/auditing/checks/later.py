"""Does training know the time after a target? Interactions of other users from then on show what was about to become popular.

Ji et al. (A Critical Study on Data Leakage in Recommender System Offline Evaluation, arXiv 2010.11060) measure what that is worth.
One such interaction is a finding: this is a count, not a sample.
"""

import numpy as np

from rec_dist.auditing.chance import percent
from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import Subject
from rec_dist.data.dataset.prepared_data import SequenceSplit
from rec_dist.runtime.arrays import I64


def _times(split: SequenceSplit) -> I64:
    """(N,): the timestamps of all items of all rows."""
    parts = [split.timestamps_of(row) for row in range(len(split))]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _run(subject: Subject) -> Outcome:
    if subject.split is None:
        return Outcome(skipped="questions from a file have no times.")
    assert subject.data is not None
    train, asked = _times(subject.data.split("train")), subject.data.split(subject.split)
    if not len(train):
        return Outcome(skipped="the train split has no user.")
    row_of = {int(user): row for row, user in enumerate(asked.user_ids.tolist())}
    targets = np.asarray([asked.timestamps_of(row_of[e.user_id])[e.position] for e in subject.examples], dtype=np.int64)
    later, before_end = int((train > targets.min()).sum()), int((targets < train.max()).sum())
    measured = (
        f"{later:,} of {len(train):,} training interactions ({percent(later / len(train))}) are later than the first target of "
        f"the {subject.split} split; {before_end:,} of {len(targets):,} targets are earlier than the last of them."
    )
    if not later:
        return Outcome([measured])
    split = subject.data.manifest.settings.get("split", "another split")
    return Outcome([measured], [f"Training knows the future of its targets ({split}); prepare with data.split=global_temporal."])


LATER = Check("later", "Are training interactions later than the targets?", "data", _run)
