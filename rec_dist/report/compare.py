"""Compares models on the same users, targets and candidates: metrics with intervals, and paired differences."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.data.artifacts.predictions import PREDICTIONS_NAME, Predictions
from rec_dist.errors import UserError
from rec_dist.evaluation.bootstrap import Floats, bootstrap_interval, paired_difference
from rec_dist.evaluation.measure import metric_names, metrics_per_question, summarize_parts
from rec_dist.report.table import ComparisonRow, Difference, headline_of, seen_of
from rec_dist.runtime.arrays import I64
from rec_dist.runtime.run_directory import RunDirectory

_SEED = 0  # of the bootstrap, so that the same files always give the same intervals


@dataclass(frozen=True)
class Compared:
    """A comparison and the evaluation it is based on.

    differences: of the pairs. shares: of each ensemble to itself without a member or term. num_candidates: how many items were
    ranked, "all", or "given" where the questions brought various numbers. source: the split or the file of the questions.
    """

    rows: list[ComparisonRow]
    differences: list[Difference]
    shares: list[Difference]
    num_users: int
    num_questions: int
    num_candidates: int | str
    source: str

    @property
    def summary(self) -> str:
        """What was asked, as a sentence."""
        several = self.num_questions > self.num_users
        asked = f"{self.num_questions:,} questions of {self.num_users:,} users" if several else f"{self.num_users} users"
        among = {"all": "all items ranked", "given": "candidates from the file"}.get(
            str(self.num_candidates), f"{self.num_candidates} candidates each"
        )
        return f"{asked} of {self.source}, {among}."


def compare(folders: Mapping[str, Path], pairs: Sequence[Sequence[str]], metrics: Sequence[str]) -> Compared:
    """Reads each folder's predictions. pairs: (better, worse) names.

    The folders may differ in evaluate.exclude_seen alone: the table names that protocol then, and no pair may span both. Raises
    UserError if two folders hold predictions for different questions or other candidates, or if a metric is unknown.
    """
    predictions = {name: Predictions.read(folder / PREDICTIONS_NAME) for name, folder in folders.items()}
    facts = {name: _evaluation_row(folder) for name, folder in folders.items()}
    seen = {name: seen_of(row) for name, row in facts.items()}
    first_name, first = next(iter(predictions.items()))
    for name, other in predictions.items():
        like = next(each for each in seen if seen[each] == seen[name])  # the first with the same protocol
        alike = all(facts[name].get(key) == facts[first_name].get(key) for key in ("questions_fingerprint", "num_candidates"))
        if not (alike and _same_questions(first, other) and _same_candidates(predictions[like], other)):
            raise UserError(
                f"{name} and {first_name} were evaluated on different users, targets or candidates; evaluate both with the same "
                "section `evaluate` on the same data"
            )
    for better, worse in pairs:
        if seen[better] != seen[worse]:
            raise UserError(
                f"pipeline.pairs: {better} and {worse} differ in evaluate.exclude_seen (seen items {seen[better]}, {seen[worse]}), so "
                "their difference says nothing about the models; pair evaluations of one protocol"
            )
    values = {name: metrics_per_question(prediction) for name, prediction in predictions.items()}
    _check_metrics(metrics, {name: list(each) for name, each in values.items()})
    rows = [
        ComparisonRow(
            name,
            {metric: bootstrap_interval(values[name][metric], seed=_SEED, users=first.user_ids).to_dict() for metric in metrics},
            tokens=facts[name].get("tokens"),
            seconds=facts[name].get("seconds"),
            dtype=facts[name].get("dtype"),
            seen=seen[name],
            recall=facts[name].get("recall"),
            parts=summarize_parts(predictions[name], seed=_SEED, metrics=metrics),
        )
        for name in folders
    ]
    differences = [
        Difference(better, worse, metric, _paired(values[better][metric], values[worse][metric], first.user_ids))
        for better, worse in pairs
        for metric in headline_of(metrics)
    ]
    shares = [
        Difference(name, f"{name} without {member}", metric, interval)
        for name, fact in facts.items()
        for member, intervals in fact.get("shares", {}).items()
        for metric, interval in intervals.items()
        if metric in headline_of(metrics)
    ]
    row = facts[first_name]
    source = str(row["questions"]) if "questions" in row else f"the {row['split']} split"
    return Compared(rows, differences, shares, len(np.unique(first.user_ids)), len(first.user_ids), row["num_candidates"], source)


def _check_metrics(metrics: Sequence[str], measured: Mapping[str, list[str]]) -> None:
    """Raises UserError for a metric that nobody measures, or that some model lacks. measured: of each model."""
    for metric in metrics:
        lacking = [name for name, own in measured.items() if metric not in own]
        if lacking and metric in metric_names():
            raise UserError(
                f"pipeline.metrics names {metric}, which {lacking[0]} does not have, since evaluate.search=exact gives no ranks "
                "beyond its limit; leave it out, or evaluate that one with evaluate.search=all"
            )
        if lacking:
            raise UserError(
                f"pipeline.metrics names {metric}, which is not measured; choose from {', '.join(measured[lacking[0]])}"
            )


def _paired(first: Floats, second: Floats, users: I64) -> dict[str, float | int]:
    return paired_difference(first, second, seed=_SEED, users=users).to_dict()


def _same_questions(first: Predictions, other: Predictions) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(other, name)) for name in ("user_ids", "positions", "targets"))


def _same_candidates(first: Predictions, other: Predictions) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first.candidates, other.candidates, strict=True))


def _evaluation_row(folder: Path) -> dict[str, Any]:
    value = json.loads(RunDirectory(folder).evaluation.read_text(encoding="utf-8"))
    return dict(value["row"])
