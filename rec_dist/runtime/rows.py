"""Read files that grow by lines, and count the rows of metrics.jsonl. A damaged row is skipped; the others are kept.

A line ends at a line feed only: str.splitlines would also cut a text at U+2028 or U+0085, which JSON allows inside.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
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
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a kill cut the line short, or a byte flipped
            continue
        if isinstance(row, dict) and _is_whole(row):
            rows.append(row)
    return rows


def lines_after(path: Path, position: int) -> tuple[list[str], int]:
    """(whole lines of a file from byte `position` on, the next position)."""
    if not path.is_file():
        return [], position
    with path.open("rb") as handle:
        handle.seek(position)
        data = handle.read()
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode("utf-8", "replace").split("\n")[:-1], position + len(whole)


def num_restarts(rows: Iterable[Mapping[str, Any]]) -> int:
    """How often training started again: after a failure, on other workers, or by the same command.

    An automatic restart leaves two rows, its reason and `resume`. A restart by hand leaves only `resume`.
    """
    events = [str(row["event"]) for row in rows if row.get("event") in ("restart", "resize", "resume")]
    by_itself = len(events) - events.count("resume")
    by_hand = sum(event == before == "resume" for before, event in pairwise(["resume", *events]))
    return by_itself + by_hand


def num_bad_steps(rows: Iterable[Mapping[str, Any]], *, until: int) -> int:
    """How many steps in a row, up to and with step `until`, were left out."""
    bad = {row["step"] for row in rows if row.get("event") == "bad_step"}
    first = until
    while first in bad:
        first -= 1
    return until - first


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
