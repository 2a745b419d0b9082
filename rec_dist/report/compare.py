"""Compares models on the same users, targets and candidates: metrics with intervals, and paired differences."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.data.artifacts.predictions import PREDICTIONS_NAME, Predictions
from rec_dist.errors import UserError
from rec_dist.evaluation.bootstrap import Floats, bootstrap_interval, paired_difference
from rec_dist.evaluation.measure import metric_names, metrics_of_repeats, summarize_parts
from rec_dist.report.table import ComparisonRow, Difference, headline_of, seen_of
from rec_dist.runtime.arrays import I64
from rec_dist.runtime.run_directory import RunDirectory

_SEED = 0  # of the bootstrap, so that the same files always give the same intervals
_ASKED = ("questions_fingerprint", "num_candidates")  # facts of an evaluation that all rows of a table share


@dataclass(frozen=True)
class Compared:
    """A comparison and the evaluation it is based on.

    differences: of the pairs. shares: of each ensemble without repeats to itself without a member or term. num_candidates: how many
    items were ranked, "all", "low_rated", or "given" where the questions brought various numbers. source: the split or the file of
    the questions.
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
        among = {
            "all": "all items ranked",
            "given": "candidates from the file",
            "low_rated": "each target among items that its user rated low",
        }.get(str(self.num_candidates), f"{self.num_candidates} candidates each")
        return f"{asked} of {self.source}, {among}."


def compare(folders: Mapping[str, Sequence[Path]], pairs: Sequence[Sequence[str]], metrics: Sequence[str]) -> Compared:
    """Reads the predictions in the folders of each row, one a repeat with a seed of its own. pairs: (better, worse) names.

    The folders may differ in evaluate.exclude_seen alone: the table names that protocol then, and no pair may span both. Raises
    UserError if two folders hold predictions for different questions or other candidates, if the repeats of a pair differ in
    number, or if a metric is unknown.
    """
    flat = {(name, number): folder for name, each in folders.items() for number, folder in enumerate(each)}
    predictions = {key: Predictions.read(folder / PREDICTIONS_NAME) for key, folder in flat.items()}
    facts = {key: _evaluation_row(folder) for key, folder in flat.items()}
    first = _check_alike(predictions, facts)
    seen = {name: seen_of(facts[name, 0]) for name in folders}
    _check_pairs(pairs, seen, {name: len(each) for name, each in folders.items()})
    values = {name: metrics_of_repeats([predictions[name, number] for number in range(len(folders[name]))]) for name in folders}
    _check_metrics(metrics, {name: list(each) for name, each in values.items()})
    rows = []
    for name, each in folders.items():
        wanted = {metric: values[name][metric] for metric in metrics}
        row, *others = (facts[name, number] for number in range(len(each)))
        rows.append(
            ComparisonRow(
                name,
                {metric: bootstrap_interval(of, seed=_SEED, users=first.user_ids).to_dict() for metric, of in wanted.items()},
                tokens=_sum(fact.get("tokens") for fact in (row, *others)),
                seconds=_sum(fact.get("seconds") for fact in (row, *others)),
                dtype=row.get("dtype"),
                seen=seen[name],
                recall=None if others else row.get("recall"),
                parts=summarize_parts(predictions[name, 0], seed=_SEED, values=wanted),
            )
        )
    differences = [
        Difference(better, worse, metric, _paired(values[better][metric], values[worse][metric], first.user_ids))
        for better, worse in pairs
        for metric in headline_of(metrics)
    ]
    shares = [
        Difference(name, f"{name} without {member}", metric, interval)
        for name, each in folders.items()
        if len(each) == 1
        for member, intervals in facts[name, 0].get("shares", {}).items()
        for metric, interval in intervals.items()
        if metric in headline_of(metrics)
    ]
    row = next(iter(facts.values()))
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


def _check_alike(
    predictions: Mapping[tuple[str, int], Predictions], facts: Mapping[tuple[str, int], dict[str, Any]]
) -> Predictions:
    """The first predictions; their keys are a row and a repeat. Raises UserError if others answer other questions."""
    first_of: dict[str | None, Predictions] = {}  # by what became of the seen items
    (first_name, _), first = next(iter(predictions.items()))
    asked = [facts[next(iter(facts))].get(key) for key in _ASKED]
    for (name, number), other in predictions.items():
        fact = facts[name, number]
        like = first_of.setdefault(seen_of(fact), other)
        alike = [fact.get(key) for key in _ASKED] == asked and seen_of(fact) == seen_of(facts[name, 0])
        if not (alike and _same_questions(first, other) and _same_candidates(like, other)):
            raise UserError(
                f"{name} and {first_name} were evaluated on different users, targets or candidates; evaluate both with the same "
                "section `evaluate` on the same data"
            )
    return first


def _check_pairs(pairs: Sequence[Sequence[str]], seen: Mapping[str, str | None], repeats: Mapping[str, int]) -> None:
    for better, worse in pairs:
        if seen[better] != seen[worse]:
            raise UserError(
                f"pipeline.pairs: {better} and {worse} differ in evaluate.exclude_seen (seen items {seen[better]}, {seen[worse]}), so "
                "their difference says nothing about the models; pair evaluations of one protocol"
            )
        if repeats[better] != repeats[worse] and 1 not in (repeats[better], repeats[worse]):
            raise UserError(
                f"pipeline.pairs: {better} has {repeats[better]} stages and {worse} {repeats[worse]}, which are paired seed by seed; "
                "give both rows the same seeds, or one of them a single stage"
            )


def _sum(numbers: Iterable[float | None]) -> Any:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _paired(first: Floats, second: Floats, users: I64) -> dict[str, float | int]:
    return paired_difference(first, second, seed=_SEED, users=users).to_dict()


def _same_questions(first: Predictions, other: Predictions) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(other, name)) for name in ("user_ids", "positions", "targets"))


def _same_candidates(first: Predictions, other: Predictions) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first.candidates, other.candidates, strict=True))


def _evaluation_row(folder: Path) -> dict[str, Any]:
    value = json.loads(RunDirectory(folder).evaluation.read_text(encoding="utf-8"))
    return dict(value["row"])
