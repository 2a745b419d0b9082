"""The comparison of models as a table, for the terminal (report/text_table.py) and for the report's page.

A difference is "above 0" or "below 0" only if the interval of the paired difference excludes 0; otherwise there is no significant
difference. A larger value of one model alone proves nothing. Every metric is better when larger.
Pure functions: intervals come in as {"value", "low", "high", "n"}; cells and text come out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rec_dist.config.pipeline_schema import PublishedRow
from rec_dist.report.numbers import MISSING, Interval, format_count, format_interval, format_seconds

ABOVE, BELOW, LEVEL = "above 0", "below 0", "no significant difference"
HEADLINE_METRICS = ("hr@1", "ndcg@10")  # the terminal has no room for the intervals of more
KEPT, REMOVED = "kept", "removed"  # the items of the history, among the candidates
TEXT_COLUMNS = (
    "metric",
    "verdict",
    "command",
    "run directory",
    "seen items",
    "what was measured",
)  # left, as the first column; numbers are aligned right


@dataclass(frozen=True)
class ComparisonRow:
    """One model: its metrics by name ("hr@1") and the cost of its evaluation, None where it was not counted.

    tokens, seconds: of all repeats of a row. dtype: what a language model computed in; None for other models. seen: KEPT or
    REMOVED, what became of the history's items among the candidates; None where a file named the candidates. parts: the same
    metrics of a part of the questions, by its name. recall: of an ensemble in two stages, how often the target is among the `num`
    items retrieved; None for other models.
    """

    name: str
    metrics: Mapping[str, Interval]
    tokens: int | None = None
    seconds: float | None = None
    dtype: str | None = None
    seen: str | None = None
    parts: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    recall: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Difference:
    """`better` minus `worse` in one metric, paired over questions. The names state the expectation, not the outcome."""

    better: str
    worse: str
    metric: str
    interval: Interval

    @property
    def verdict(self) -> str:
        """ABOVE or BELOW if the interval excludes 0, otherwise LEVEL."""
        return ABOVE if self.interval["low"] > 0 else BELOW if self.interval["high"] < 0 else LEVEL

    @property
    def amount(self) -> str:
        """The difference with its interval, signed: `+0.021 [+0.010, +0.032]`."""
        return format_interval(self.interval, signed=True)

    @property
    def size(self) -> str:
        """The same without plus signs, for a sentence that already says which model is ahead."""
        return self.amount.replace("+", "")

    @property
    def left_out(self) -> str:
        """What `worse` is `better` without; empty if they are two models of their own."""
        start = f"{self.better} without "
        return self.worse.removeprefix(start) if self.worse.startswith(start) else ""

    @property
    def label(self) -> str:
        """`A - B`, or `share of SASRec in A` for what leaving a member out costs."""
        return f"share of {self.left_out} in {self.better}" if self.left_out else f"{self.better} - {self.worse}"

    def seen_from(self, name: str) -> "Difference":
        """The same difference with `name`, one of its two models, as the minuend."""
        if name == self.better:
            return self
        value, low, high = (self.interval[key] for key in ("value", "low", "high"))
        return Difference(self.worse, self.better, self.metric, {**self.interval, "value": -value, "low": -high, "high": -low})


@dataclass(frozen=True)
class Cell:
    """A cell's text. bounds: the interval behind a metric's value. best: whether the value is the largest of its column."""

    text: str
    bounds: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header of as many columns; the first column holds names."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    footer: Sequence[str] = ()


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """Every metric of every model with its interval. The columns of the protocol, n, tokens and time appear where they say something.

    The largest value is that of the rows with the same protocol.
    """
    metrics = metric_names(rows)
    largest = {metric: best_names(rows, metric) for metric in metrics}
    costs = {
        "seeds": any(repeats_of(row) > 1 for row in rows),
        "seen items": len(protocols(rows)) > 1,
        "n": len(user_counts(rows)) > 1,
        "tokens": any(row.tokens is not None for row in rows),
        "time": any(row.seconds is not None for row in rows),
    }
    shown = [name for name, is_shown in costs.items() if is_shown]
    lines = []
    for row in rows:
        cells = [Cell(row.name)]
        for metric in metrics:
            text = format_interval(row.metrics[metric]) if metric in row.metrics else MISSING
            value, _, bounds = text.partition(" ")
            cells.append(Cell(value, bounds, row.name in largest[metric]))
        users = "/".join(f"{count:,}" for count in user_counts([row])) or MISSING
        texts = {
            "seeds": str(repeats_of(row)),
            "seen items": row.seen or MISSING,
            "n": users,
            "tokens": format_count(row.tokens),
            "time": format_seconds(row.seconds),
        }
        lines.append([*cells, *(Cell(texts[name]) for name in shown)])
    return Table(["model", *metrics, *shown], lines)


def with_published(table: Table, published: Sequence[PublishedRow]) -> Table:
    """`table` with a row for each published one behind its own."""
    lines = [*table.rows]
    for row in published:
        values = [f"{row.metrics[heading]:.3f}" if heading in row.metrics else MISSING for heading in table.header[1:]]
        lines.append([Cell(row.name), *map(Cell, values)])
    return Table(table.header, lines, table.footer)


def published_note(published: Sequence[PublishedRow]) -> str:
    """`published, not measured here: SASRec, S-DPO (SOURCE)`; empty without any."""
    names: dict[str, list[str]] = {}
    for row in published:
        names.setdefault(row.source, []).append(row.name)
    parts = "; ".join(f"{', '.join(rows)} ({source})" for source, rows in names.items())
    return f"published, not measured here: {parts}" if parts else ""


def differences_table(differences: Sequence[Difference]) -> Table:
    """One row a pair of models and metric: the difference with its interval, and the verdict."""
    texts = [(d.label, d.metric, d.amount, d.verdict) for d in differences]
    return Table(["paired difference", "metric", "difference [95 %]", "verdict"], [list(map(Cell, row)) for row in texts])


def metric_names(rows: Iterable[ComparisonRow]) -> list[str]:
    """The metrics of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(metric for row in rows for metric in row.metrics))


def headline_of(metrics: Sequence[str]) -> list[str]:
    """Metrics with intervals on a terminal and paired differences: all of up to two, else hr@1 and ndcg@10, else the first."""
    known = [metric for metric in HEADLINE_METRICS if metric in metrics]
    return list(metrics) if len(metrics) <= len(HEADLINE_METRICS) else known or list(metrics[:1])


def seen_of(row: Mapping[str, Any]) -> str | None:
    """KEPT or REMOVED from the row of an evaluation; None where a file named the candidates. Rows from before had them removed."""
    excluded = row.get("exclude_seen", True)
    return None if excluded is None else REMOVED if excluded else KEPT


def protocols(rows: Iterable[ComparisonRow]) -> list[str | None]:
    """What became of the history's items, in the order of the first row of each."""
    return list(dict.fromkeys(row.seen for row in rows))


def seen_note(rows: Sequence[ComparisonRow]) -> str:
    """What to know about the history's items; empty in the usual case, where all rows have them removed."""
    found = protocols(rows)
    if len(found) > 1:
        return "seen items: whether a user's earlier items were ranked too; compare rows of one kind only"
    return "seen items kept: a user's earlier items were ranked too" if found == [KEPT] else ""


def best_names(rows: Sequence[ComparisonRow], metric: str) -> set[str]:
    """The models with the largest value among those with the same protocol; none where fewer than two models have one."""
    of_each = ([row for row in rows if row.seen == seen] for seen in protocols(rows))
    return {name for part in of_each for name in _best_of(part, metric)}


def _best_of(rows: Sequence[ComparisonRow], metric: str) -> set[str]:
    values = {row.name: row.metrics[metric]["value"] for row in rows if metric in row.metrics}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if len(finite) < 2:
        return set()
    top = max(finite.values())
    return {name for name, value in finite.items() if value == top}


def user_counts(rows: Iterable[ComparisonRow]) -> list[int]:
    """The distinct numbers of users behind the values, ascending."""
    return sorted({int(interval["n"]) for row in rows for interval in row.metrics.values()})


def user_range(rows: Sequence[ComparisonRow]) -> str:
    """`n = 900 users`, or `n = 850 to 900 users` if the models were evaluated on different numbers; `n = 900 users, 2,100
    questions` if users have several."""
    counts = user_counts(rows) or [0]
    asked = sorted({int(i["questions"]) for row in rows for i in row.metrics.values() if "questions" in i})
    return f"n = {_range(counts)} users" + (f", {_range(asked)} questions" if asked else "")


def repeats_of(row: ComparisonRow) -> int:
    """How many runs, each with a seed of its own, the row is the mean of."""
    return max((int(interval.get("repeats", 1)) for interval in row.metrics.values()), default=1)


def intervals_note(rows: Sequence[ComparisonRow]) -> str:
    """Of what the intervals are: `[95 % interval over users]`, or over users and seeds where rows have several."""
    several = any(repeats_of(row) > 1 for row in rows)
    return f"[95 % interval over users{', and over seeds where a row has several' if several else ''}]"


def _range(numbers: Sequence[int]) -> str:
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def dtypes(rows: Sequence[ComparisonRow]) -> str:
    """`language models computed in bfloat16: base, SFT`, or several such parts; empty without language models."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.dtype is not None:
            names.setdefault(row.dtype, []).append(row.name)
    parts = "; in ".join(f"{dtype}: {', '.join(models)}" for dtype, models in names.items())
    return f"language models computed in {parts}" if parts else ""
