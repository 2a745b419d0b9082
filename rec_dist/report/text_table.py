"""The comparison as a table of text, for the terminal and table.txt."""

import textwrap
from collections.abc import Sequence

from rec_dist.config.pipeline_schema import PublishedRow
from rec_dist.report.parts import parts_note, parts_table, recall_note
from rec_dist.report.table import (
    TEXT_COLUMNS,
    ComparisonRow,
    Difference,
    comparison_table,
    differences_table,
    dtypes,
    headline_of,
    intervals_note,
    metric_names,
    published_note,
    seen_note,
    user_range,
    with_published,
)
from rec_dist.runtime.messages import visible

_MAX_WIDTH = 120
_MIN_NAME_WIDTH = 14


def text_table(
    rows: Sequence[ComparisonRow], differences: Sequence[Difference] = (), published: Sequence[PublishedRow] = ()
) -> str:
    """The table for a terminal, at most 120 columns wide for six metrics: only those of headline_of show their intervals."""
    table = with_published(comparison_table(rows), published)
    detailed = headline_of(metric_names(rows))
    grid = [list(table.header)]
    for cells in table.rows:
        line = [visible(cells[0].text)]
        for heading, cell in zip(table.header[1:], cells[1:], strict=True):
            # Where another value has its star, a blank keeps the digits of the column aligned.
            mark = ("*" if cell.best else " ") if heading in metric_names(rows) else ""
            line.append(f"{cell.text}{mark} {cell.bounds}" if cell.bounds and heading in detailed else f"{cell.text}{mark}")
        grid.append(line)
    lines = [*align(grid), "", f"{user_range(rows)}; {intervals_note(rows)}; * largest value, by itself no proof"]
    if note := seen_note(rows):
        lines.append(note)
    if note := recall_note(rows):
        lines += textwrap.wrap(visible(note), _MAX_WIDTH)
    if note := published_note(published):
        lines += textwrap.wrap(note, _MAX_WIDTH)
    if parts := parts_table(rows):
        shown = [[visible(cells[0].text), *(f"{cell.text} {cell.bounds}".strip() for cell in cells[1:])] for cells in parts.rows]
        lines += ["", *align([list(parts.header), *shown]), "", parts_note(rows)]
    if any(row.seconds is not None for row in rows):
        lines.append("time, tokens: those of the evaluation, without training")
    if computed := dtypes(rows):
        lines.append(computed)
    if differences:
        pairs = differences_table(differences)
        lines += ["", *align([list(pairs.header), *([visible(cell.text) for cell in cells] for cells in pairs.rows)])]
    return "\n".join(lines) + "\n"


def align(grid: list[list[str]]) -> list[str]:
    """The lines of a table whose first row is the header. A long first cell wraps, so that nothing is cut."""
    widths = [max(len(row[column]) for row in grid) for column in range(len(grid[0]))]
    others = sum(width + 2 for width in widths[1:])
    widths[0] = min(widths[0], max(_MIN_NAME_WIDTH, _MAX_WIDTH - others))
    lines = []
    for number, row in enumerate(grid):
        name, *wrapped = textwrap.wrap(row[0], widths[0]) or [""]
        cells = [name.ljust(widths[0])]
        for cell, heading, width in zip(row[1:], grid[0][1:], widths[1:], strict=True):
            cells.append(cell.ljust(width) if heading in TEXT_COLUMNS else cell.rjust(width))
        lines += ["  ".join(cells).rstrip(), *wrapped]
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return lines
