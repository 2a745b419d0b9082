"""The report of a comparison: one HTML file that opens from disk (page.html.j2), and what it reads from run directories.

A result is read away from the machine that made it, by someone who asks which model is better, by how much, at what cost, and how
to repeat it. The page fetches nothing and runs no script. Writing it takes about 2 s; it has 50-300 kB.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from rec_dist.config.pipeline_schema import CurvesConfig, PublishedRow
from rec_dist.errors import UserError
from rec_dist.report import plots
from rec_dist.report.findings import findings
from rec_dist.report.numbers import Interval, format_count, format_seconds
from rec_dist.report.parts import parts_note, parts_table, recall_note
from rec_dist.report.render import render
from rec_dist.report.table import (
    HEADLINE_METRICS,
    Cell,
    ComparisonRow,
    Difference,
    Table,
    comparison_table,
    differences_table,
    dtypes,
    published_note,
    seen_note,
    user_range,
    with_published,
)
from rec_dist.storage.files import write_text

_RUN_FILES = ("metrics.jsonl", "config.yaml", "environment.json")
_WHISKER_WIDTH = 166.0  # of an interval drawn in a table, in the units of its SVG

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StageSummary:
    """One stage of the pipeline: its command and its cost; tokens is None where no model read any."""

    name: str
    command: str
    seconds: float
    tokens: int | None = None
    run_dir: str = ""


@dataclass(frozen=True)
class RunSummary:
    """The contents of a run directory.

    steps: column of metrics.jsonl -> (S,) float64, ascending in steps["step"], NaN where a row has no number.
    unreadable_lines: lines of metrics.jsonl that are not JSON objects, as a killed writer leaves them.
    """

    name: str
    steps: Mapping[str, FloatArray] = field(default_factory=dict)
    config_text: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    unreadable_lines: int = 0


@dataclass(frozen=True)
class Report:
    """Everything on the page. Names are unique; a run or stage has the colour of the row with its name.

    shares: of each ensemble to itself without a member. num_candidates: how many items each user's one relevant item was ranked
    among; None shows no chance level.
    """

    title: str
    summary: Sequence[str] = ()
    rows: Sequence[ComparisonRow] = ()
    published: Sequence[PublishedRow] = ()
    curves: CurvesConfig | None = None
    differences: Sequence[Difference] = ()
    shares: Sequence[Difference] = ()
    stages: Sequence[StageSummary] = ()
    runs: Sequence[RunSummary] = ()
    data_facts: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    num_candidates: int | None = None


def read_run(run_dir: Path, name: str | None = None) -> RunSummary:
    """Reads metrics.jsonl, config.yaml and environment.json; the name is the folder's unless given.

    A resumed run repeats steps: the last row of a step counts, and rows after the step resumed from are dropped.
    Raises UserError if there is no metrics.jsonl, so that this is not a run directory.
    """
    metrics_path, config_path, environment_path = (run_dir / name for name in _RUN_FILES)
    if not metrics_path.is_file():
        raise UserError(f"{run_dir} holds no metrics.jsonl; give the train.run_dir of a run that has started")
    environment = _parse(environment_path.read_text(encoding="utf-8")) if environment_path.is_file() else {}
    if environment is None:
        raise UserError(f"{environment_path} is not a JSON object; restore or delete it")
    rows: dict[int, Mapping[str, Any]] = {}
    unreadable = 0
    for line in metrics_path.read_text(encoding="utf-8", errors="replace").split("\n"):
        row = _parse(line)
        if row is None:
            unreadable += bool(line.strip())
        elif row.get("event") == "step" and isinstance(row.get("step"), int):
            rows[row["step"]] = row
        elif row.get("event") == "resume" and isinstance(row.get("step"), int):
            rows = {step: kept for step, kept in rows.items() if step <= row["step"]}
    return RunSummary(
        name=name or run_dir.resolve().name,
        steps=_columns([rows[step] for step in sorted(rows)]),
        config_text=config_path.read_text(encoding="utf-8") if config_path.is_file() else "",
        environment=environment,
        unreadable_lines=unreadable,
    )


def write_report(path: Path, report: Report) -> None:
    """Writes the report to `path`, whole or not at all."""
    colors = plots.model_colors([row.name for row in report.rows] + [run.name for run in report.runs])
    curves = {run.name: run.steps for run in report.runs}
    environments = [_flatten(run.environment) for run in report.runs]
    first, *rest = environments or [{}]
    shared = {key: value for key, value in first.items() if all(key in other and other[key] == value for other in rest)}
    notes = (
        user_range(report.rows),
        seen_note(report.rows),
        published_note(report.published),
        recall_note(report.rows),
        dtypes(report.rows),
    )
    page = render(
        "page.html.j2",
        report=report,
        findings=findings(report.rows, report.differences, report.num_candidates),
        comparison=with_published(comparison_table(report.rows), report.published),
        parts=parts_table(report.rows),
        parts_note=parts_note(report.rows),
        differences=differences_table([*report.differences, *report.shares]),
        stages=_stages_table(report.stages),
        users="; ".join(filter(None, notes)),
        data_facts=_flatten(report.data_facts),
        shared=shared,
        own=[{key: value for key, value in facts.items() if key not in shared} for facts in environments],
        colors=colors,
        whiskers=_whiskers([*report.differences, *report.shares]),
        share_bars=Markup(share_bars(report.shares, colors)),
        metric_bars=Markup(plots.metric_bars(report.rows, HEADLINE_METRICS, colors, report.num_candidates)),
        metric_curves=Markup(plots.metric_curves(report.rows, report.curves)),
        loss_curves=Markup(plots.loss_curves(curves, colors)),
        reward_curves=Markup(plots.reward_curves(curves, colors)),
        stage_bars=Markup(plots.stage_bars([(s.name, s.seconds, s.tokens) for s in report.stages], colors)),
    )
    write_text(path, page)


def share_bars(shares: Sequence[Difference], colors: Mapping[str, str]) -> str:
    """A panel an ensemble, with a bar and interval for what each member and term adds to ndcg@10. "" without shares."""
    metric = HEADLINE_METRICS[-1]
    rows: dict[str, dict[str, Interval]] = {}
    for share in shares:
        if share.metric == metric:
            rows.setdefault(share.left_out, {})[share.better] = share.interval
    panels = list(dict.fromkeys(share.better for share in shares))
    return plots.metric_bars([ComparisonRow(name, row) for name, row in rows.items()], panels, colors, None, name="shares")


def _stages_table(stages: Sequence[StageSummary]) -> Table:
    """One row a stage with its own tokens and time, and their sum."""
    rows = []
    for stage in stages:
        speed = stage.tokens / stage.seconds if stage.tokens and stage.seconds > 0 else None
        costs = [format_count(stage.tokens), format_seconds(stage.seconds), format_count(speed)]
        rows.append([Cell(text) for text in (stage.name, stage.command, stage.run_dir, *costs)])
    tokens, seconds = sum(stage.tokens or 0 for stage in stages), sum(stage.seconds for stage in stages)
    footer = ["all stages", "", "", format_count(tokens or None), format_seconds(seconds), ""]
    return Table(["stage", "command", "run directory", "own tokens", "own time", "tokens/s"], rows, footer)


def _whiskers(differences: Sequence[Difference]) -> list[dict[str, float] | None]:
    """Where 0 and each difference's low, value and high stand on one scale, in SVG units; None if one is not finite."""
    bounds = [d.interval[key] for d in differences for key in ("low", "high") if math.isfinite(d.interval[key])]
    low, high = min([*bounds, 0.0]), max([*bounds, 1e-9])  # 0 is always in sight
    places: list[dict[str, float] | None] = []
    for d in differences:
        numbers = {"zero": 0.0, **{key: d.interval[key] for key in ("low", "value", "high")}}
        place = {key: 5 + (number - low) / (high - low) * _WHISKER_WIDTH for key, number in numbers.items()}
        places.append(place if all(map(math.isfinite, place.values())) else None)
    return places


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, FloatArray]:
    def number(value: Any) -> float:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan

    keys = dict.fromkeys(key for row in rows for key, value in row.items() if not math.isnan(number(value)))
    return {key: np.array([number(row.get(key)) for row in rows], dtype=np.float64) for key in keys}
