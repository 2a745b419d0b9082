"""How the report looks: the page, its sheet of styles and the HTML pieces it is made of.

Every function takes plain values and returns HTML with all text escaped, except where an argument is called `html`
or `cells`: that one is HTML already. Nothing here knows what a report tells.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from rec_dist.report.table import (
    MISSING,
    ComparisonRow,
    Difference,
    best_names,
    format_count,
    format_interval,
    format_seconds,
    metric_names,
    user_counts,
)

_MINUS = "\N{MINUS SIGN}"  # as wide as a plus, so that columns of signed numbers line up
_WHISKER = (176.0, 18.0)  # width and height of an interval drawn in a table cell, in its own examples


def page(title: str, html: str) -> str:
    """A whole document: its styles stand inside it and its policy forbids every request."""
    css = files("rec_dist.report").joinpath("report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n{html}\n</body>\n</html>\n"
    )


def header(title: str, html: str, anchors: Iterable[tuple[str, str]]) -> str:
    """The title, what stands under it, and a line of links to the sections."""
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in anchors)
    return f"<header>\n<h1>{escape(title)}</h1>\n{html}\n<nav>{links}</nav>\n</header>"


def section(anchor: str, title: str, html: str) -> str:
    """A heading that can be linked to, and what stands under it."""
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{html}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is its class."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def finding(text: str) -> str:
    """The one sentence to remember."""
    return f'<div class="finding">{paragraph(text)}</div>'


def bullets(lines: Iterable[str]) -> str:
    """A list of plain sentences, "" for none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def figure(html: str, caption: str) -> str:
    """A drawing with its caption; "" for an empty drawing."""
    return f"<figure>{html}<figcaption>{escape(caption)}</figcaption></figure>" if html else ""


def preformatted(text: str) -> str:
    """Commands or configuration, as written."""
    return f"<pre>{escape(text)}</pre>"


def code(text: str) -> str:
    """A command or a path within a line."""
    return f"<code>{escape(text)}</code>" if text else ""


def folded(title: str, html: str) -> str:
    """Something long, closed until asked for."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def facts(values: Mapping[str, Any]) -> str:
    """Nested mappings as a two-column list, keys joined by dots; "" for none."""
    lines = [f"<tr><th>{escape(key)}</th><td>{escape(_plain(value))}</td></tr>" for key, value in flatten(values).items()]
    return f'<table class="facts"><tbody>{"".join(lines)}</tbody></table>' if lines else ""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shared_facts(many: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that are the same in all of several nested mappings, by dotted key."""
    first, *rest = [flatten(values) for values in many] or [{}]
    return {key: value for key, value in first.items() if all(key in flat and flat[key] == value for flat in rest)}


def named(name: str, colors: Mapping[str, str]) -> str:
    """A model's name behind its colour."""
    color = colors.get(name)
    swatch = f'<span class="swatch" style="background:{color}"></span>' if color else ""
    return f"{swatch}{escape(name)}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]], numeric: Iterable[int], footer: Sequence[str] = ()) -> str:
    """Lines of HTML cells, the first of each line its heading; `numeric` columns stand right."""
    right = set(numeric)

    def line(cells: Sequence[str], tag: str, first: str) -> str:
        tags = [first] + [tag] * (len(cells) - 1)
        parts = [f"<{t}{_class('num' if i in right else '')}>{c}</{t}>" for i, (t, c) in enumerate(zip(tags, cells, strict=True))]
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(line(cells, "td", "th") for cells in lines)
    foot = f"\n<tfoot>{line(footer, 'td', 'th')}</tfoot>" if footer else ""
    head = line([escape(name) for name in header], "th", "th")
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>{foot}</table></div>'


def comparison_table(rows: Sequence[ComparisonRow], colors: Mapping[str, str]) -> str:
    """Every metric of every model with its interval under it; the largest value of a column in bold."""
    metrics = metric_names(rows)
    several_counts = len(user_counts(rows)) > 1
    winners = {metric: best_names(rows, metric) for metric in metrics}
    lines = []
    for row in rows:
        cells = [named(row.name, colors)]
        for metric in metrics:
            value, _, bounds = format_interval(row.metrics.get(metric, _NOTHING)).partition(" ")
            kind = "best" if row.name in winners[metric] else ""
            cells.append(f'<span{_class(kind)}>{value}<span class="bounds">{bounds}</span></span>')
        if several_counts:
            cells.append("/".join(f"{count:,}" for count in user_counts([row])))
        cells += [format_count(row.tokens), format_seconds(row.seconds)]
        lines.append(cells)
    header = ["model", *metrics, *(["users"] if several_counts else []), "tokens", "time"]
    return table(header, lines, range(1, len(header)))


def differences_table(differences: Sequence[Difference]) -> str:
    """One line a pair: the difference, its interval as numbers and drawn against 0, and the verdict."""
    bounds = [d.interval[key] for d in differences for key in ("low", "high") if math.isfinite(d.interval[key])]
    span = min([*bounds, 0.0]), max([*bounds, 1e-9])  # 0 is always in sight
    lines = []
    for d in differences:
        kind = {"above 0": "above", "below 0": "below"}.get(d.verdict, "")
        lines.append(
            [
                f"{escape(d.better)} {_MINUS} {escape(d.worse)}",
                escape(d.metric),
                d.amount.replace("-", _MINUS),
                whisker(d, span),
                f'<span class="verdict {kind}">{d.verdict}</span>',
            ]
        )
    return table(["paired difference", "metric", "difference [95 %]", "around 0", "verdict"], lines, [2])


def stages_table(stages: Sequence[tuple[str, str, str, int | None, float]], colors: Mapping[str, str]) -> str:
    """One line a stage, given as (name, command, run directory, its own tokens, its own seconds), and their sum."""
    lines = []
    for name, command, run_dir, tokens, seconds in stages:
        speed = tokens / seconds if tokens and seconds > 0 else None
        costs = [format_count(tokens), format_seconds(seconds), format_count(speed)]
        lines.append([named(name, colors), code(command), code(run_dir), *costs])
    all_tokens, all_seconds = sum(s[3] or 0 for s in stages), sum(s[4] for s in stages)
    footer = ["all stages", "", "", format_count(all_tokens or None), format_seconds(all_seconds), ""]
    return table(["stage", "command", "run directory", "own tokens", "own time", "tokens/s"], lines, [3, 4, 5], footer)


def configs(runs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """Each run, given as (name, config, environment), folded: its config and where its environment differs."""
    shared = shared_facts([environment for _, _, environment in runs])
    html = []
    for name, config, environment in runs:
        own = {key: value for key, value in flatten(environment).items() if key not in shared}
        html.append(folded(name, preformatted(config or "(no config.yaml in the run directory)") + facts(own)))
    return "".join(html)


def whisker(difference: Difference, span: tuple[float, float]) -> str:
    """A difference and its interval drawn on a scale from span[0] to span[1], with a dashed line at 0."""
    width, height = _WHISKER
    numbers = [difference.interval[key] for key in ("low", "value", "high")]
    if not all(map(math.isfinite, numbers)):
        return ""
    scale = (width - 10) / (span[1] - span[0])
    zero, low, value, high = (5 + (number - span[0]) * scale for number in (0.0, *numbers))
    middle = height / 2
    return (
        f'<svg class="whisker" viewBox="0 0 {width:.0f} {height:.0f}" aria-hidden="true">'
        f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{height:.0f}"/>'
        f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot" cx="{value:.1f}" cy="{middle}" r="2.4"/></svg>'
    )


_NOTHING = {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _plain(value: Any) -> str:
    """One value as a reader wants it: no quotes around a word, no NaN, nested lists as JSON."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple) and not any(isinstance(part, list | tuple | dict) for part in value):
        return ", ".join(_plain(part) for part in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
