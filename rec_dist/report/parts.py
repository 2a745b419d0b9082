"""The comparison by kind of question: targets that training never saw, and users with few items, each beside all questions."""

from collections.abc import Sequence

from rec_dist.evaluation.measure import SHORT_HISTORY
from rec_dist.report.numbers import MISSING, Interval, format_interval
from rec_dist.report.table import Cell, ComparisonRow, Table, headline_of, metric_names


def parts_table(rows: Sequence[ComparisonRow]) -> Table | None:
    """One metric (the last of headline_of) for all questions and for each part of them; None where no row has parts."""
    names = list(dict.fromkeys(part for row in rows for part in row.parts))
    if not names:
        return None
    metric = headline_of(metric_names(rows))[-1]
    lines = []
    for row in rows:
        cells = [Cell(row.name)]
        for values in (row.metrics, *(row.parts.get(name, {}) for name in names)):
            value, _, bounds = (format_interval(values[metric]) if metric in values else MISSING).partition(" ")
            cells.append(Cell(value, bounds))
        lines.append(cells)
    sizes = {name: max(_questions(row.parts[name][metric]) for row in rows if name in row.parts) for name in names}
    return Table([f"{metric} of", "all", *(f"{name} ({sizes[name]:,})" for name in names)], lines)


def parts_note(rows: Sequence[ComparisonRow]) -> str:
    """What the columns of parts_table() are; empty without parts."""
    known = {name for row in rows for name in row.parts}
    notes = {
        "cold": "cold, warm: targets that the train split never holds, and all others",
        "short history": f"short history: at most {SHORT_HISTORY} items before the target",
    }
    texts = [text for name, text in notes.items() if name in known]
    return "; ".join([*texts, "in brackets: questions"]) if texts else ""


def recall_note(rows: Sequence[ComparisonRow]) -> str:
    """`recall, ...: NAME 0.62 [0.60, 0.64] of 100`, for ensembles in two stages; empty without any."""
    found = [f"{row.name} {format_interval(row.recall)} of {int(row.recall['num'])}" for row in rows if row.recall is not None]
    return f"recall, how often the target is among the items retrieved: {'; '.join(found)}" if found else ""


def _questions(interval: Interval) -> int:
    return int(interval.get("questions", interval["n"]))
