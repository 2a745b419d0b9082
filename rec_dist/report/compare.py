"""Compares models on the same users, targets and candidates: metrics with intervals, and paired differences."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.data.artifacts.predictions import PREDICTIONS_NAME, Predictions
from rec_dist.errors import UserError
from rec_dist.evaluation.bootstrap import bootstrap_interval, paired_difference
from rec_dist.evaluation.measure import metrics_per_user
from rec_dist.report.table import ComparisonRow, Difference, headline_of
from rec_dist.runtime.run_directory import RunDirectory

_SEED = 0  # of the bootstrap, so that the same files always give the same intervals


@dataclass(frozen=True)
class Compared:
    """A comparison and the evaluation it is based on."""

    rows: list[ComparisonRow]
    differences: list[Difference]
    num_users: int
    num_candidates: int | str
    split: str


def compare(folders: Mapping[str, Path], pairs: Sequence[Sequence[str]], metrics: Sequence[str]) -> Compared:
    """Reads each folder's predictions. pairs: (better, worse) names.

    Raises UserError if two folders hold predictions for different examples, or if a metric is unknown.
    """
    predictions = {name: Predictions.read(folder / PREDICTIONS_NAME) for name, folder in folders.items()}
    first_name, first = next(iter(predictions.items()))
    for name, other in predictions.items():
        if not _same_examples(first, other):
            raise UserError(
                f"{name} and {first_name} were evaluated on different users, targets or candidates; evaluate both with the same "
                "section `evaluate` on the same data"
            )
    values = {name: metrics_per_user(prediction) for name, prediction in predictions.items()}
    if missing := [metric for metric in metrics if metric not in values[first_name]]:
        raise UserError(
            f"pipeline.metrics names {missing[0]}, which is not measured; choose from {', '.join(values[first_name])}"
        )
    facts = {name: _evaluation_row(folder) for name, folder in folders.items()}
    rows = [
        ComparisonRow(
            name,
            {metric: bootstrap_interval(values[name][metric], seed=_SEED).to_dict() for metric in metrics},
            tokens=facts[name].get("tokens"),
            seconds=facts[name].get("seconds"),
            dtype=facts[name].get("dtype"),
        )
        for name in folders
    ]
    differences = [
        Difference(better, worse, metric, paired_difference(values[better][metric], values[worse][metric], seed=_SEED).to_dict())
        for better, worse in pairs
        for metric in headline_of(metrics)
    ]
    row = facts[first_name]
    return Compared(rows, differences, len(first.user_ids), row["num_candidates"], str(row["split"]))


def _same_examples(first: Predictions, other: Predictions) -> bool:
    same = all(np.array_equal(getattr(first, name), getattr(other, name)) for name in ("user_ids", "positions", "targets"))
    return same and all(np.array_equal(a, b) for a, b in zip(first.candidates, other.candidates, strict=True))


def _evaluation_row(folder: Path) -> dict[str, Any]:
    value = json.loads(RunDirectory(folder).evaluation.read_text(encoding="utf-8"))
    return dict(value["row"])
