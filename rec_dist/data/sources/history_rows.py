"""Rows of a history and its target, as benchmarks ship them and as evaluate.questions takes them. The header says which layout.

    user_id, history, target             and candidates, if there are any: questions of your own, also as JSON lines or Parquet
    user_id, history_item_id, item_id    MiniOneRec; other columns are ignored
    user_id, item_ids                    BEAR and MSL: the last item is the target

A list of items is a JSON list, a Python literal, or a list column of Parquet. The user may have any of the names in roles.py. Files
may be packed. A file is read whole: 10,000 rows take 0.3 s.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.data.sources.header import listed
from rec_dist.data.sources.interactions import BadRows, UnusableRowError
from rec_dist.data.sources.packed import plain_suffix
from rec_dist.data.sources.parquet import read_records
from rec_dist.data.sources.records import JSON, TEXT_TABLES, read_text_records
from rec_dist.data.sources.roles import user_column
from rec_dist.data.sources.text import NoListError, parsed_list
from rec_dist.errors import UserError

_PARQUET = ".parquet"


@dataclass(frozen=True)
class Layout:
    """The columns of the history and the target; target None: the last item of the history column is the target."""

    history: str
    target: str | None
    candidates: str | None = None

    @property
    def columns(self) -> list[str]:
        """All columns that a file must have beside the user's."""
        return [name for name in (self.history, self.target) if name is not None]


OWN = Layout("history", "target", "candidates")
MINIONEREC = Layout("history_item_id", "item_id")
BEAR = Layout("item_ids", None)


@dataclass(frozen=True)
class HistoryRow:
    """One row, in the names of its source: the history, oldest first, with at least one item, and its target.

    line: the line of the file in which it begins, from 1; in Parquet and a JSON array, its number.
    """

    line: int
    user: str
    history: list[str]
    target: str
    candidates: list[str] | None


def read_history_rows(path: Path, bad: BadRows, layouts: Sequence[Layout]) -> list[HistoryRow]:
    """The usable rows of a file in order; the others are added to `bad`.

    layouts: those that are accepted; the first whose columns the file has is taken. Raises UserError if there is none, or if the
    file is unreadable.
    """
    kind = plain_suffix(path)
    if kind in TEXT_TABLES + JSON:
        records = _of_text(path, bad, layouts)
    elif kind == _PARQUET:
        records = _of_parquet(path, layouts)
    else:
        raise UserError(f"{path} is no file of .csv, .tsv, .json, .jsonl (also .gz) or .parquet; write its rows as one of them.")
    rows = []
    user = None
    for line, layout, fields in records:
        user = user or user_column(f"{path}:{line}", list(fields))
        try:
            rows.append(_row(line, user, layout, fields))
        except UnusableRowError as fault:
            bad.add(str(fault), path, np.array([line]), json.dumps(fields, ensure_ascii=False, default=str))
    return rows


Records = Iterator[tuple[int, Layout, dict[str, Any]]]


def _of_text(path: Path, bad: BadRows, layouts: Sequence[Layout]) -> Records:
    """Cells of csv without the blanks around them, and fields of JSON as they are."""
    layout, is_table = layouts[0], plain_suffix(path) in TEXT_TABLES

    def check_names(names: list[str]) -> None:
        nonlocal layout
        layout = _layout(path, names, layouts)
        if is_table:
            user_column(f"{path}:1", names)

    for record in read_text_records(path, check_names):
        if record.fault is not None:
            bad.add(record.fault, path, np.array([record.line]), record.text)
        elif is_table:
            wanted = _wanted(path, list(record.fields), layout)
            yield record.line, layout, {name: record.fields[name].strip() for name in wanted}
        else:
            yield record.line, layout, record.fields


def _of_parquet(path: Path, layouts: Sequence[Layout]) -> Records:
    layout = layouts[0]

    def wanted(names: list[str]) -> list[str]:
        nonlocal layout
        layout = _layout(path, names, layouts)
        return _wanted(path, names, layout)

    for row, fields in read_records(path, wanted):
        yield row, layout, fields


def _wanted(path: Path, names: Sequence[str], layout: Layout) -> list[str]:
    wanted = (user_column(f"{path}:1", names), *layout.columns, layout.candidates)
    return [name for name in wanted if name is not None and name in names]


def _layout(path: Path, names: Sequence[str], layouts: Sequence[Layout]) -> Layout:
    for layout in layouts:
        if set(layout.columns) <= set(names):
            return layout
    wanted = " or ".join(", ".join(["user_id", *layout.columns]) for layout in layouts)
    raise UserError(f"{path}:1: the columns are {listed(names)}; they must hold {wanted}.")


def _row(line: int, user_column: str, layout: Layout, fields: dict[str, Any]) -> HistoryRow:
    user = _name(fields.get(user_column), user_column)
    history = _names(fields.get(layout.history), layout.history)
    if layout.target is None:
        history, target = history[:-1], history[-1] if history else ""
    else:
        target = _name(fields.get(layout.target), layout.target)
    if not history:
        raise UnusableRowError("no item before the target")
    candidates = fields.get(layout.candidates) if layout.candidates is not None else None
    return HistoryRow(line, user, history, target, _names(candidates, "candidates") if candidates not in (None, "") else None)


def _name(value: object, column: str) -> str:
    """The name of a user or item. Numbers must be whole: 3.0 would be another name than 3."""
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise UnusableRowError(f"{column} is neither a text nor a whole number")
    return str(value)


def _names(value: object, column: str) -> list[str]:
    if isinstance(value, str):
        try:
            value = parsed_list(value, whole_numbers=True)
        except NoListError as fault:
            raise UnusableRowError(f"{column}: {fault}") from None
    if not isinstance(value, list):
        raise UnusableRowError(f"{column} is not a list of items")
    return [_name(entry, column) for entry in value]
