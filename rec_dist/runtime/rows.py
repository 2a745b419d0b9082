"""Read the rows of metrics.jsonl. A damaged row is skipped; the others are kept."""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

OF_A_STEP = ("step", "bad_step", "validation", "checkpoint", "checkpoint_failed")  # repeated by a restart from an earlier step
_WITH_STEP = (*OF_A_STEP, "restart", "resize", "resume", "failed")
_WITH_REASON = ("checkpoint_failed", "restart", "failed")
_NUMBERS = ("time", "step_seconds", "tokens")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All intact rows; an empty list if the file does not exist."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a kill cut the line short, or a byte flipped
            continue
        if isinstance(row, dict) and _is_whole(row):
            rows.append(row)
    return rows


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of its event, with finite numbers where numbers belong."""
    event = row.get("event")
    return (
        (event not in _WITH_STEP or type(row.get("step")) is int)
        and (event not in _WITH_REASON or isinstance(row.get("reason"), str))
        and (event != "start" or "time" in row)
        and are_numbers(*(row[key] for key in _NUMBERS if key in row))
    )


def are_numbers(*values: object) -> bool:
    """Whether all values are finite numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) for value in values)
