"""The report's figures as SVG text. The only file that imports matplotlib, without pyplot and so without global figures.

Text stays text (svg.fonttype none), so a figure can be searched and takes 10-60 kB.
The colours are Okabe and Ito's, which colour-blind readers can distinguish, and which are readable on white.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rec_dist.config.pipeline_schema import CurvesConfig
from rec_dist.report.columns import has, smooth, thin
from rec_dist.report.numbers import chance_level, format_count, format_seconds
from rec_dist.report.table import ComparisonRow

FloatArray = npt.NDArray[np.float64]
Curves = Mapping[str, Mapping[str, FloatArray]]  # run -> column of metrics.jsonl -> (S,) values, one a step

_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c3e", "#4d4d4d")
_INK, _FAINT, _GRID = "#1b1f24", "#6b7280", "#e3e6ea"
_WIDTH_INCHES = 9.2
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rec-dist",  # the same data gives the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a model's name may hold a dollar sign
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": _FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def model_colors(names: Iterable[str]) -> dict[str, str]:
    """One colour a model, by first appearance. The ninth model reuses the first colour: figures also name their models."""
    unique = list(dict.fromkeys(names))
    return {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(unique)}


def loss_curves(runs: Curves, colors: Mapping[str, str]) -> str:
    """A panel a run, each with its own scale, because losses of different objectives do not compare. "" if no run has steps."""
    drawn = {name: steps for name, steps in runs.items() if has(steps, "loss")}
    if not drawn:
        return ""
    columns = min(3, max(2, len(drawn)))
    lines = math.ceil(len(drawn) / columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, 2.15 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, (name, steps) in zip(panels, drawn.items(), strict=False):
            color = colors.get(name, _FAINT)
            _raw_and_smooth(panel, steps["step"], steps["loss"], color)
            panel.set_title(name, color=color, fontweight="bold")
            _step_axis(panel)
        for panel in panels[len(drawn) :]:
            panel.set_axis_off()
        panels[0].set_ylabel("loss")
        return _svg(figure, "loss", "Training loss over optimizer steps, one panel a run")


def reward_curves(runs: Curves, colors: Mapping[str, str]) -> str:
    """A row a run: rewards of chosen and rejected completions, their margin, and the accuracy. "" if no run has rewards."""
    drawn = {name: steps for name, steps in runs.items() if has(steps, "rewards/margins")}
    if not drawn:
        return ""
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, 2.3 * len(drawn)), layout="constrained")
        panels = figure.subplots(len(drawn), 2, squeeze=False, width_ratios=(3, 2))
        for (left, right), (name, steps) in zip(panels, drawn.items(), strict=True):
            color = colors.get(name, _FAINT)
            left.axhline(0, color=_FAINT, linewidth=0.7)
            styles = (
                ("chosen", color, "-", 1.5),
                ("rejected", color, (0, (3, 1.6)), 1.5),
                ("margins", _INK, "-", 1.1),
            )
            for key, ink, dash, width in styles:
                if has(steps, f"rewards/{key}"):
                    points = thin(steps["step"], smooth(steps[f"rewards/{key}"]))
                    left.plot(*points, color=ink, linestyle=dash, linewidth=width, label=key.removesuffix("s"))
            left.legend(loc="upper left", ncols=3, fontsize=8, handlelength=2.2, borderaxespad=0)
            left.margins(y=0.2)
            left.set_title(f"{name}: implicit reward", color=color, fontweight="bold")
            if has(steps, "rewards/accuracies"):
                _raw_and_smooth(right, steps["step"], steps["rewards/accuracies"], color)
            right.set_ylim(0, 1.02)
            right.set_title("accuracy: chosen above rejected", color=color)
            _step_axis(left)
            _step_axis(right)
        return _svg(figure, "rewards", "Rewards of chosen and rejected completions and their accuracy over steps")


def metric_bars(
    rows: Sequence[ComparisonRow],
    metrics: Sequence[str],
    colors: Mapping[str, str],
    num_candidates: int | None,
    *,
    name: str = "metrics",
) -> str:
    """A panel a metric with a bar and interval for each model, and a dashed line at chance. "" without rows. name: of the figure."""
    metrics = [metric for metric in metrics if any(metric in row.metrics for row in rows)]
    if not metrics:
        return ""
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, 0.95 + 0.36 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        for panel, metric in zip(panels, metrics, strict=True):
            for position, row in enumerate(rows):
                if metric in row.metrics and math.isfinite(row.metrics[metric]["value"]):
                    _metric_bar(panel, position, row.metrics[metric], colors.get(row.name, _FAINT))
            chance = chance_level(metric, num_candidates) if num_candidates else None
            if chance is not None:
                panel.axvline(chance, color=_INK, linewidth=1, linestyle=(0, (3, 2)))
                panel.text(chance, -0.62, f" chance {chance:.3f}", fontsize=8, va="bottom", color=_INK)
            panel.set_title(metric, fontweight="bold", pad=15)  # leaves room for the word "chance" below
            low, high = panel.get_xlim()
            panel.set_xlim(min(low, 0) * 1.12, max(high, 0) * 1.12)  # differences may be below 0
            panel.grid(axis="y", visible=False)
            panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        panels[0].set_yticks(range(len(rows)), [row.name for row in rows], color=_INK)
        panels[0].set_ylim(len(rows) - 0.45, -0.65)
        return _svg(figure, name, f"{' and '.join(metrics)} of every model with 95 % intervals")


def metric_curves(rows: Sequence[ComparisonRow], curves: CurvesConfig | None) -> str:
    """A panel a metric with a line for each of `curves`, and an interval at each point. "" without curves."""
    if curves is None:
        return ""
    found = {row.name: row.metrics for row in rows}
    lines = list(dict.fromkeys(point.line for point in curves.points))
    metrics = list(dict.fromkeys(metric for point in curves.points for metric in found[point.row]))
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, 2.6), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for panel, metric in zip(panels, metrics, strict=True):
            for name, color in model_colors(lines).items():
                points = sorted((p.x, p.row) for p in curves.points if p.line == name and metric in found[p.row])
                intervals = [found[row][metric] for _, row in points]
                value, low, high = (np.array([each[key] for each in intervals]) for key in ("value", "low", "high"))
                places = [x for x, _ in points]
                panel.errorbar(
                    places,
                    value,
                    yerr=np.maximum([value - low, high - value], 0),
                    color=color,
                    marker="o",
                    capsize=2.5,
                    label=name,
                )
            panel.set_title(metric, fontweight="bold")
            panel.set_xlabel(curves.axis, loc="right", labelpad=1)
        panels[0].legend(fontsize=8)
        return _svg(figure, "curves", f"{', '.join(metrics)} against {curves.axis}, with 95 % intervals")


def stage_bars(stages: Sequence[tuple[str, float, int | None]], colors: Mapping[str, str]) -> str:
    """Time and tokens of each stage, given as (name, seconds, tokens), side by side. "" without stages."""
    if not stages:
        return ""
    names, seconds, tokens = zip(*stages, strict=True)
    counts = [math.nan if count is None else float(count) for count in tokens]
    sides: list[tuple[str, list[float], Any]] = [("time", list(seconds), format_seconds)]
    if not all(map(math.isnan, counts)):
        sides.append(("tokens", counts, format_count))
    positions = range(len(names))
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, 0.6 + 0.32 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(sides), squeeze=False, sharey=True)[0]
        for panel, (title, values, write) in zip(panels, sides, strict=True):
            lengths = np.nan_to_num(values)
            panel.barh(positions, lengths, height=0.62, color=[colors.get(name, "#8b93a0") for name in names])
            for position, value, length in zip(positions, values, lengths, strict=True):
                _label(panel, write(value), length, position)
            panel.set_title(title, fontweight="bold")
            panel.set_xlim(0, (lengths.max() or 1) * 1.22)
            panel.grid(visible=False)
            panel.xaxis.set_visible(False)  # every bar carries its number
            panel.spines["bottom"].set_visible(False)
        panels[0].set_yticks(positions, names, color=_INK)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        return _svg(figure, "stages", "Time and tokens of every stage")


def _raw_and_smooth(panel: Any, steps: FloatArray, values: FloatArray, color: str) -> None:
    panel.plot(*thin(steps, values), color=color, linewidth=0.8, alpha=0.3)
    panel.plot(*thin(steps, smooth(values)), color=color, linewidth=1.8)


def _metric_bar(panel: Any, position: int, interval: Mapping[str, float], color: str) -> None:
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    panel.barh(position, value, height=0.62, color=color, alpha=0.85)
    end = value
    if math.isfinite(low) and math.isfinite(high):
        panel.errorbar(value, position, xerr=[[value - low], [high - value]], color=_INK, linewidth=1.1, capsize=2.5)
        end = high
    _label(panel, f"{value:.3f}", end, position)


def _label(panel: Any, text: str, end: float, position: int) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # hides a line that passes behind the label
    panel.annotate(text, (end, position), (5, 0), textcoords="offset points", va="center", fontsize=8.5, bbox=box)


def _step_axis(panel: Any) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    panel.set_xlabel("step", loc="right", labelpad=1)


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one <svg> element without metadata, whose ids cannot clash with another figure's."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # matplotlib lays out with one font, but the browser draws with its own, which may have the missing glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="@@">', text, count=1)
    text = text.replace("xlink:href", "href")  # SVG inside HTML needs no namespaces, so the page holds no URL
    return text.replace("@@", description).strip()
