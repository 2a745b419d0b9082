"""The comparison of models as text: a table for the terminal, the same as Markdown, and the claim it allows.

Why verdicts: a table invites reading any larger number as a win. Here a difference is "above 0" only where the
interval of the paired difference excludes 0; the rest is "not told apart". Every metric is better when larger.
Pure functions: intervals come in ready-made as {"value", "low", "high", "n"}, text comes out.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Interval = Mapping[str, float]

_MAX_WIDTH = 120
_MIN_NAME_WIDTH = 14
_WORDS = ("metric", "verdict")  # columns of words, set left
HEADLINE_METRICS = ("hr@1", "ndcg@10")  # the terminal has no room for the intervals of more
MISSING = "–"  # noqa: RUF001 - an en dash is how tables write "no value"


@dataclass(frozen=True)
class ComparisonRow:
    """One model: its metrics by name ("hr@1") and what its score cost, None where not counted."""

    name: str
    metrics: Mapping[str, Interval]
    tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Difference:
    """`better` minus `worse` in one metric, paired over users. The names say what was expected, not what came out."""

    better: str
    worse: str
    metric: str
    interval: Interval

    @property
    def verdict(self) -> str:
        """ "above 0" or "below 0" when the interval excludes 0, else "not told apart"."""
        if self.interval["low"] > 0:
            return "above 0"
        if self.interval["high"] < 0:
            return "below 0"
        return "not told apart"

    @property
    def amount(self) -> str:
        """The difference with its interval, signed: `+0.021 [+0.010, +0.032]`."""
        return format_interval(self.interval, signed=True)

    @property
    def size(self) -> str:
        """The same for a sentence that already says which of the two is ahead: no plus signs."""
        return self.amount.replace("+", "")

    def seen_from(self, name: str) -> "Difference":
        """The same difference with `name`, one of its two models, as the minuend."""
        if name == self.better:
            return self
        interval = self.interval
        flipped = {
            "value": -interval["value"],
            "low": -interval["high"],
            "high": -interval["low"],
            "n": interval["n"],
        }
        return Difference(self.worse, self.better, self.metric, flipped)


def format_interval(interval: Interval, *, signed: bool = False) -> str:
    """`0.412 [0.391, 0.433]`, or signed; a fourth digit where a bound would otherwise read as 0 without being 0."""
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if not math.isfinite(value):
        return MISSING
    hidden = any(0 < abs(bound) < 0.0005 for bound in (low, high))
    spec = f"{'+' if signed else ''}.{4 if hidden else 3}f"
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{value:{spec}}"
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def format_count(count: float | None) -> str:
    """Three significant digits: `812`, `12.3 k`, `4.56 M`, `7.89 B`."""
    if count is None or not math.isfinite(count):
        return MISSING
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit * 0.9995:  # 999,600 reads 1.00 M, not 1000 k
            scaled = count / limit
            decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{decimals}f} {suffix}"
    return f"{count:.0f}"


def format_seconds(seconds: float | None) -> str:
    """`4.2 s`, `12 m 05 s`, `3 h 07 m`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} m"


def metric_names(rows: Iterable[ComparisonRow]) -> list[str]:
    """The metrics of all rows, in the order in which they first appear."""
    return list(dict.fromkeys(metric for row in rows for metric in row.metrics))


def best_names(rows: Sequence[ComparisonRow], metric: str) -> set[str]:
    """The models with the largest point value; empty below two models, as nothing is then won."""
    values = {row.name: row.metrics[metric]["value"] for row in rows if metric in row.metrics}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if len(finite) < 2:
        return set()
    top = max(finite.values())
    return {name for name, value in finite.items() if value == top}


def user_counts(rows: Iterable[ComparisonRow]) -> list[int]:
    """The distinct numbers of users behind the values, ascending."""
    return sorted({int(interval["n"]) for row in rows for interval in row.metrics.values()})


def chance_level(metric: str, num_candidates: int) -> float | None:
    """The expected metric of a random order of C candidates with one relevant item; None for metrics not listed here.

    hr@K: K/C. ndcg@K: the sum of 1/log2(r + 1) over ranks r <= K, over C. mrr: that of 1/r over r <= C. auc: 1/2.
    """
    kind, _, cutoff = metric.partition("@")
    ranks = range(1, min(int(cutoff) if cutoff.isdigit() else num_candidates, num_candidates) + 1)
    gains = {"hr": lambda r: 1.0, "ndcg": lambda r: 1 / math.log2(r + 1), "mrr": lambda r: 1 / r}
    if kind == "auc":
        return 0.5
    return sum(map(gains[kind], ranks)) / num_candidates if kind in gains and num_candidates > 0 else None


def text_table(rows: Sequence[ComparisonRow], differences: Sequence[Difference] = ()) -> str:
    """The table for a terminal, at most 120 columns for six metrics: intervals stand on those of headline_of."""
    metrics = metric_names(rows)
    # A blank where another value has its star keeps the digits of a column under each other.
    lines = _align(_grid(rows, headline_of(metrics), lambda value, best: value + ("*" if best else " ")))
    lines += ["", f"{_users(rows)}; [95 % interval over users]; * largest value, by itself no proof"]
    if any(row.seconds is not None for row in rows):
        lines.append("time, tokens: of the evaluation; no training is in them")
    if differences:
        lines += ["", *_align(_pair_grid(differences))]
    return "\n".join(lines) + "\n"


def headline_of(metrics: Sequence[str]) -> list[str]:
    """Of these, what has intervals on a terminal and paired differences: all of two, else hr@1 and ndcg@10, else the first."""
    known = [metric for metric in HEADLINE_METRICS if metric in metrics]
    return list(metrics) if len(metrics) <= len(HEADLINE_METRICS) else known or list(metrics[:1])


def markdown_table(rows: Sequence[ComparisonRow], differences: Sequence[Difference] = ()) -> str:
    """The same as text_table for a README: every metric with its interval, the largest value in bold."""
    lines = _markdown(_grid(rows, metric_names(rows), lambda value, best: f"**{value}**" if best else value))
    lines += ["", f"{_users(rows)}; 95 % intervals over users; **bold**: largest value, by itself no proof."]
    if differences:
        lines += ["", *_markdown(_pair_grid(differences))]
    return "\n".join(lines) + "\n"


def claim(leader: str, metric: str, pairs: Sequence[Difference], unmeasured: Sequence[str] = ()) -> str:
    """One sentence on the model with the largest value: what it beats, with intervals, and what it is not told apart from.

    pairs: differences with `leader` as the minuend; unmeasured: the models without one.
    """
    beaten, level, lost = ([d for d in pairs if d.verdict == v] for v in ("above 0", "not told apart", "below 0"))
    parts = [f"{leader} has the highest {metric}, but is not shown to beat any other model"]
    if beaten:
        parts = [f"{leader} beats {enumerate_names([f'{d.worse} by {d.size}' for d in beaten])} on {metric}"]
    if level:
        parts.append(f"it is not told apart from {enumerate_names([f'{d.worse} ({d.amount})' for d in level])}")
    if lost:
        parts.append(f"it falls behind {enumerate_names([f'{d.worse} by {d.seen_from(d.worse).size}' for d in lost])}")
    if unmeasured:
        parts.append(f"its difference to {enumerate_names(unmeasured)} was not measured")
    return "; ".join(parts) + "."


def enumerate_names(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _grid(rows: Sequence[ComparisonRow], detailed: Sequence[str], show: Callable[[str, bool], str]) -> list[list[str]]:
    """Header and cells: intervals on `detailed` metrics, `show(value, is_best)` writes a value; n, tokens, time where told."""
    metrics = metric_names(rows)
    extra = {
        "n": len(user_counts(rows)) > 1,
        "tokens": any(row.tokens is not None for row in rows),
        "time": any(row.seconds is not None for row in rows),
    }
    shown = [name for name, told in extra.items() if told]
    grid = [["model", *metrics, *shown]]
    for row in rows:
        cells = [row.name]
        for metric in metrics:
            text = format_interval(row.metrics[metric]) if metric in row.metrics else MISSING
            value, _, bounds = text.partition(" ")
            value = show(value, row.name in best_names(rows, metric))
            cells.append(f"{value} {bounds}" if bounds and metric in detailed else value)
        users = "/".join(str(count) for count in user_counts([row])) or MISSING
        costs = {"n": users, "tokens": format_count(row.tokens), "time": format_seconds(row.seconds)}
        grid.append(cells + [costs[name] for name in shown])
    return grid


def _pair_grid(differences: Sequence[Difference]) -> list[list[str]]:
    header = ["paired difference", "metric", "difference [95 %]", "verdict"]
    return [header, *([f"{d.better} - {d.worse}", d.metric, d.amount, d.verdict] for d in differences)]


def _users(rows: Sequence[ComparisonRow]) -> str:
    counts = user_counts(rows) or [0]
    return f"n = {counts[0]:,} users" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,} users"


def _align(table: list[list[str]]) -> list[str]:
    """Pads cells to columns: words left, numbers right. A long first cell wraps, so that nothing is cut."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    others = sum(width + 2 for width in widths[1:])
    widths[0] = min(widths[0], max(_MIN_NAME_WIDTH, _MAX_WIDTH - others))
    lines = []
    for number, row in enumerate(table):
        name, *wrapped = textwrap.wrap(row[0], widths[0]) or [""]
        cells = [name.ljust(widths[0])]
        for cell, heading, width in zip(row[1:], table[0][1:], widths[1:], strict=True):
            cells.append(cell.ljust(width) if heading in _WORDS else cell.rjust(width))
        lines += ["  ".join(cells).rstrip(), *wrapped]
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return lines


def _markdown(table: list[list[str]]) -> list[str]:
    header, *body = table
    special = str.maketrans({mark: "\\" + mark for mark in "\\|*_`[]"} | {"<": "&lt;"})
    rule = ["---", *("---" if name in _WORDS else "---:" for name in header[1:])]
    lines = [header, rule, *([cells[0].translate(special), *cells[1:]] for cells in body)]
    return [f"| {' | '.join(cells)} |" for cells in lines]
