"""The arguments of `python -m benchmarks.peers`. A mistake ends with one line and exit code 2 before anything is measured."""

import json
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.peer_methods import Shape
from benchmarks.peer_targets import Point
from benchmarks.results import read_result

METHODS = ("a", "b", "c-default", "c-best", "c-liger", "d", "e")
SAME = ("commit", "machine", "versions", "shape", "threads", "methods")  # must be equal for rows in one table


def points_of(text: str) -> list[Point]:
    """Parses P:K[:G],...; C is 8, and G is one group a step by default."""
    found = []
    for entry in text.split(","):
        try:
            prompt, negatives, *groups = (int(number) for number in entry.split(":"))
        except ValueError:
            raise ArgumentTypeError(f"{entry!r} is not P:K or P:K:G in whole numbers, such as 100:3:4") from None
        if len(groups) > 1 or min(prompt, negatives, *groups) < 1:
            raise ArgumentTypeError(f"{entry!r} is not P:K or P:K:G, each 1 or more, such as 100:3:4")
        found.append(Point(prompt, 8, negatives, *(groups or [1])))
    if len({(point.prompt, point.negatives) for point in found}) < len(found):
        raise ArgumentTypeError(f"{text!r} names a P and K twice; the table has one line for each")
    return found


def methods_of(text: str) -> list[str]:
    """Parses names of METHODS, separated by commas."""
    names = text.split(",")
    if strange := [name for name in names if name not in METHODS]:
        raise ArgumentTypeError(f"{strange[0]!r} is not one of {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def shape_of(text: str) -> dict[str, Any]:
    """Parses changes of the default Shape from a JSON object."""
    try:
        changes = json.loads(text)
    except ValueError as fault:
        raise ArgumentTypeError(f"{text!r} is not JSON: {fault}") from None
    kinds = {field.name: type(field.default) for field in fields(Shape)}
    if not isinstance(changes, dict) or (strange := set(changes) - set(kinds)):
        what = "is not an object" if not isinstance(changes, dict) else f"has {', '.join(sorted(strange))}"
        raise ArgumentTypeError(f"{text!r} {what}; give an object with some of {', '.join(kinds)}")
    for name, value in changes.items():
        if type(value) is not kinds[name] or (kinds[name] is int and value < 1):
            raise ArgumentTypeError(f"{name} must be {'true or false' if kinds[name] is bool else 'a whole number of 1 or more'}")
    shape = Shape(**changes)
    if shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads or shape.vocab < 2:
        raise ArgumentTypeError("hidden must be a multiple of 2 * heads, heads one of kv_heads, and vocab 2 or more")
    return changes


def earlier_rows(path: Path, points: Sequence[Point], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that an interrupted run left in `path`. now: this run's value of each name in SAME.

    Raises ValueError if the rows do not belong to this run.
    """
    earlier = read_result(path)
    for name in SAME:
        if earlier.get(name) != now[name]:
            raise ValueError(f"{path} has another {name} ({earlier.get(name)}) than this run ({now[name]}); give another --out")
    rows: list[dict[str, Any]] = earlier["rows"]
    asked = {(point.prompt, point.negatives): asdict(point) for point in points}
    for row in rows:
        wanted = asked.get((row["prompt"], row["negatives"]), row)
        if any(row[name] != wanted[name] for name in ("completion", "groups")):
            raise ValueError(f"{path} has {row['groups']} groups at P={row['prompt']} K={row['negatives']}; give another --out")
    return rows
