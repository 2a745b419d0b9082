"""Templates to HTML pages. Every page extends layout.html.j2 and draws its tables with table.html.j2."""

import json
import math
from pathlib import Path
from typing import Any

import jinja2

from rec_dist.report.numbers import MISSING
from rec_dist.report.table import TEXT_COLUMNS


def render(template: str, *, colors: dict[str, str] | None = None, **values: Any) -> str:
    """The page that a template in this folder makes of `values`, with what they hold escaped, except Markup.

    colors: of names in the first column of tables.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = _plain
    page = environment.get_template(template).render(colors=colors or {}, text_columns=TEXT_COLUMNS, **values)
    return page.lstrip()


def _plain(value: Any) -> str:
    """One value for a reader: no quotes around a word, no NaN, nested lists as JSON."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple) and not any(isinstance(part, list | tuple | dict) for part in value):
        return ", ".join(_plain(part) for part in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
