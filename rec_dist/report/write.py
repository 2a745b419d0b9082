"""The report of a comparison: one HTML file that opens from disk, and the sentences its numbers allow.

Why: a result is read away from the machine that made it, by someone who asks what beats what, by how much, at what
cost, and how to repeat it. Nothing is fetched and no script runs. Cost: about 2 s, and 50-300 kB.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rec_dist.errors import UserError
from rec_dist.report import plots, style, table
from rec_dist.report.table import ComparisonRow, Difference, Interval
from rec_dist.storage.files import write_text

_RUN_FILES = ("metrics.jsonl", "config.yaml", "environment.json")
_LOSS_CAPTION = (
    "Light: every step; strong: a centred mean over about a twentieth of the run. "
    "Each panel has its own scale, as losses of different objectives do not compare."
)
_REWARD_CAPTION = (
    "Left: implicit rewards, smoothed: beta times the log-probability gained over the reference. "
    "Right: the share of rejected items that the chosen one is ahead of."
)
_COST_CAPTION = (
    "Each stage by itself: the wall time of its own command, with the start of its processes, loading, the cached reference "
    "pass and checkpoints, and the tokens of its steps and reference pass, or of its evaluation. A stage that builds on "
    "another (S-DPO on SFT) holds nothing of that one's cost: add both rows. After a stop the time is that of the longest "
    "call that came to its end; work that was done before has the seconds of finding that out, beside all its tokens."
)

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StageSummary:
    """One stage of the pipeline: the command that runs it and what it took; tokens None where none were read."""

    name: str
    command: str
    seconds: float
    tokens: int | None = None
    run_dir: str = ""


@dataclass(frozen=True)
class RunSummary:
    """What a run directory says of itself.

    steps: column of metrics.jsonl -> (S,) float64, ascending in steps["step"], NaN where a row has no number.
    evaluations: the evaluation rows as written, the last one of each (name, split).
    unreadable_lines: lines of metrics.jsonl that are not JSON objects, as a killed writer leaves them.
    """

    name: str
    steps: Mapping[str, FloatArray] = field(default_factory=dict)
    config_text: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()
    unreadable_lines: int = 0


@dataclass(frozen=True)
class Report:
    """All that is told. Names are unique; a run or stage named as a row has its colour.

    num_candidates: how many items each user's one relevant item was ranked among; None tells no chance level.
    """

    title: str
    summary: Sequence[str] = ()
    rows: Sequence[ComparisonRow] = ()
    differences: Sequence[Difference] = ()
    stages: Sequence[StageSummary] = ()
    runs: Sequence[RunSummary] = ()
    data_facts: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    num_candidates: int | None = None


def read_run(run_dir: Path, name: str | None = None) -> RunSummary:
    """Reads metrics.jsonl, config.yaml and environment.json; the name is the folder's unless given.

    A resumed run repeats steps: the last row of a step wins, and rows after the step resumed from are dropped.
    UserError when there is no metrics.jsonl: then it is not a run directory.
    """
    metrics_path, config_path, environment_path = (run_dir / name for name in _RUN_FILES)
    if not metrics_path.is_file():
        raise UserError(f"{run_dir} holds no metrics.jsonl; give the train.run_dir of a run that has started")
    environment = _parse(environment_path.read_text(encoding="utf-8")) if environment_path.is_file() else {}
    if environment is None:
        raise UserError(f"{environment_path} is not a JSON object; restore or delete it")
    rows: dict[int, Mapping[str, Any]] = {}
    evaluations: dict[tuple[Any, Any], Mapping[str, Any]] = {}
    unreadable = 0
    for line in metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _parse(line)
        if row is None:
            unreadable += bool(line.strip())
        elif row.get("event") == "step" and isinstance(row.get("step"), int):
            rows[row["step"]] = row
        elif row.get("event") == "resume" and isinstance(row.get("step"), int):
            rows = {step: kept for step, kept in rows.items() if step <= row["step"]}
        elif row.get("event") == "evaluation":
            evaluations[row.get("name"), row.get("split")] = row
    return RunSummary(
        name=name or run_dir.resolve().name,
        steps=_columns([rows[step] for step in sorted(rows)]),
        config_text=config_path.read_text(encoding="utf-8") if config_path.is_file() else "",
        environment=environment,
        evaluations=tuple(evaluations.values()),
        unreadable_lines=unreadable,
    )


def findings(report: Report) -> list[str]:
    """What the numbers allow to say: the claim first, then its evidence. "Beats" needs an interval that excludes 0."""
    metrics = [metric for metric in table.metric_names(report.rows) if _scored(report, metric)]
    if not metrics:
        return ["No model was evaluated."]
    metric = "hr@1" if "hr@1" in metrics else metrics[0]
    scored = _scored(report, metric)
    leader = max(scored, key=lambda name: scored[name]["value"])
    level = f"{table.format_interval(scored[leader])} over {int(scored[leader]['n']):,} users"
    if len(scored) == 1:
        lines = [f"{leader} reaches {metric} {level}; it was compared with no other model."]
        return lines + _against_chance(report.num_candidates, scored, metric)
    pairs = [d for d in report.differences if d.metric == metric]
    mine = [d.seen_from(leader) for d in pairs if leader in (d.better, d.worse)]
    measured = {leader, *(d.worse for d in mine)}
    lines = [table.claim(leader, metric, mine, [name for name in scored if name not in measured])]
    lines.append(f"{leader} has the highest {metric}: {level}.")
    lines += _against_chance(report.num_candidates, scored, metric)
    for verdict in ("above 0", "below 0", "not told apart"):
        rest = [d for d in pairs if d.verdict == verdict and leader not in (d.better, d.worse)]
        if rest:
            told = table.enumerate_names([f"{d.better} minus {d.worse} ({d.amount})" for d in rest])
            lines.append(f"Among the others, {verdict}: {told}.")
    known = {(d.better, d.worse): d.verdict for d in pairs}
    for d in report.differences:  # so that one metric is not picked out of several
        if known.get((d.better, d.worse), d.verdict) != d.verdict:
            lines.append(f"{d.metric} gives another verdict: {d.better} minus {d.worse} is {d.verdict}, {d.amount}.")
    return lines


def _scored(report: Report, metric: str) -> dict[str, Interval]:
    found = {row.name: row.metrics[metric] for row in report.rows if metric in row.metrics}
    return {name: interval for name, interval in found.items() if math.isfinite(interval["value"])}


def _against_chance(num_candidates: int | None, scored: Mapping[str, Interval], metric: str) -> list[str]:
    chance = table.chance_level(metric, num_candidates) if num_candidates else None
    if chance is None:
        return []
    weak = [name for name, interval in scored.items() if not interval["low"] > chance]
    verdict = f"; not shown to be better: {table.enumerate_names(weak)}" if weak else ""
    return [f"A random order of {num_candidates} candidates has an expected {metric} of {chance:.3f}{verdict}."]


def write_report(path: Path, report: Report) -> None:
    """Writes the report to `path` as one HTML file without external requests, whole or not at all."""
    colors = plots.model_colors([row.name for row in report.rows] + [run.name for run in report.runs])
    runs = [(run.name, run.config_text, run.environment) for run in report.runs]
    parts = [
        ("result", "Result", _result(report, colors)),
        ("training", "Training", _training(report, colors)),
        ("cost", "Stages and cost", _cost(report.stages, colors)),
        ("data", "Data", style.facts(report.data_facts)),
        ("repeat", "How to repeat", _repeat(report)),
        ("configs", "Resolved configurations", style.configs(runs)),
    ]
    shown = [part for part in parts if part[2]]
    summary = "".join(style.paragraph(line, "summary") for line in report.summary)
    html = style.header(report.title, summary, [(anchor, title) for anchor, title, _ in shown])
    write_text(path, style.page(report.title, "\n".join([html, *(style.section(*part) for part in shown)])))


def _result(report: Report, colors: Mapping[str, str]) -> str:
    lead, *evidence = findings(report)
    parts = [style.finding(lead), style.bullets(evidence)]
    counts = table.user_counts(report.rows)
    if counts:
        users = f"n = {counts[0]:,} users" if len(counts) == 1 else "the users stated"
        note = f"Under each value: its 95 % interval over {users}. Bold: the largest value, by itself no proof. "
        note += "Tokens and time: of the evaluation alone; what training took stands under Stages and cost."
        parts += [style.comparison_table(report.rows, colors), style.paragraph(note, "note")]
    bars = plots.metric_bars(report.rows, table.HEADLINE_METRICS, colors, report.num_candidates)
    dashed = " Dashed: the expectation of a random order of the candidates." if report.num_candidates else ""
    parts.append(style.figure(bars, f"Bars: mean over users; whiskers: 95 % interval.{dashed}"))
    if report.differences:
        note = f"First minus second, user by user. {len(report.differences)} intervals, not corrected for their number."
        parts += ["<h3>Paired differences</h3>", style.differences_table(report.differences)]
        parts.append(style.paragraph(note, "note"))
    return "\n".join(parts)


def _training(report: Report, colors: Mapping[str, str]) -> str:
    curves = {run.name: run.steps for run in report.runs}
    html = style.figure(plots.loss_curves(curves, colors), _LOSS_CAPTION)
    html += style.figure(plots.reward_curves(curves, colors), _REWARD_CAPTION)
    torn = {run.name: run.unreadable_lines for run in report.runs if run.unreadable_lines}
    lost = [f"{name}: unreadable lines of metrics.jsonl, left out: {count}." for name, count in torn.items()]
    return html + "".join(style.paragraph(line, "note") for line in lost)


def _cost(stages: Sequence[StageSummary], colors: Mapping[str, str]) -> str:
    if not stages:
        return ""
    chart = plots.stage_bars([(s.name, s.seconds, s.tokens) for s in stages], colors)
    lines = [(s.name, s.command, s.run_dir, s.tokens, s.seconds) for s in stages]
    return style.figure(chart, _COST_CAPTION) + style.stages_table(lines, colors)


def _repeat(report: Report) -> str:
    """The commands and what all runs' environments share; what differs stands with each configuration."""
    commands = style.preformatted("\n".join(report.commands)) if report.commands else ""
    shared = style.shared_facts([run.environment for run in report.runs])
    return commands + ("<h3>Versions, commit, machine, hashes</h3>" + style.facts(shared) if shared else "")


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
