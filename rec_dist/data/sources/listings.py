"""Files of users with a list of item names each: histories and candidates for `rec-dist rank`. Read row by row.

    .jsonl    {"user_id": "u1", "history": ["101", "Heat"]}       an object a line
    .csv      user_id,history                                     a cell holds a list as JSON or Python, or names with | between
    .parquet  user_id: text or whole numbers; history: a list of them, or text as in csv
    .arrow    as .parquet

Or, where the caller allows it, one name a row, with the rows of a user one below another: what `rec-dist rank` writes. The titles
of new items are read in the same way, one a row.

The user may have any of the names in roles.py, and text files may be packed. Names stay text as it is written, so `007` is not `7`;
whole numbers are written in decimal. Other columns are not read. Cost: about 5 us a row of 50 names.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rec_dist.data.sources.header import listed, refuse_twins
from rec_dist.data.sources.packed import SUFFIXES as PACKED
from rec_dist.data.sources.packed import opened, plain_suffix
from rec_dist.data.sources.records import read_text_records
from rec_dist.data.sources.roles import user_column
from rec_dist.data.sources.text import HALF_CHARACTER, NoListError, parsed_list
from rec_dist.errors import UserError, one_line

LISTING_SUFFIXES = (".jsonl", ".csv", ".parquet", ".arrow")
_TABLES = (".parquet", ".arrow")
_SEPARATOR = "|"
_BATCH_ROWS = 1024


class Listing(NamedTuple):
    """A user and the names of items. row: the line of a text file, or the row of a table, from 1."""

    row: int
    user: str
    names: list[str]


class _Layout(NamedTuple):
    """The columns of the user (user_id: any name of it) or item, and of names. alone: whether a row holds one name, not a list."""

    owner: str
    names: str
    alone: bool


def read_listings(path: Path, column: str, key: str, *, single: str | None = None) -> Iterator[Listing]:
    """The rows of a file in order. column: the one that holds the names. key: the option that names the file.

    single: a column with one name a row, read if the file has it and not `column`; rows of a user that follow one another are one
    listing. Raises UserError, with file, line and column, for a file or a row that cannot be read.
    """
    _check_file(path, key, "user_id", column)
    alone = single is not None and single in (names := _columns(path)) and column not in names
    if not alone:
        yield from _listings(path, _Layout("user_id", column, alone=False))
        return
    assert single is not None
    for user, rows in groupby(_listings(path, _Layout("user_id", single, alone=True)), key=lambda row: row.user):
        first, *others = rows
        yield Listing(first.row, user, [*first.names, *(name for row in others for name in row.names)])


def read_titles(path: Path, key: str) -> Iterator[tuple[int, str, str]]:
    """(row, item_id, title) of a file with these columns, in order. key, errors: as in read_listings."""
    _check_file(path, key, "item_id", "title")
    for row, item, titles in _listings(path, _Layout("item_id", "title", alone=True)):
        yield row, item, as_text(titles[0], f"{place_of(path, row)}: title")


def _check_file(path: Path, key: str, *columns: str) -> None:
    if plain_suffix(path) not in LISTING_SUFFIXES:
        raise UserError(
            f"{key} ({path}) must end in {', '.join(LISTING_SUFFIXES)} (packed: {', '.join(PACKED)} behind it), which says how it is "
            "read; rename or convert it"
        )
    if not path.is_file():
        raise UserError(f"{key} ({path}) is no file; give one with the columns {' and '.join(columns)}")


def _listings(path: Path, layout: _Layout) -> Iterator[Listing]:
    read = {".jsonl": _text, ".csv": _text, ".parquet": _parquet, ".arrow": _arrow}[plain_suffix(path)]
    for row, user, names in read(path, layout):
        place = place_of(path, row)
        owner, where = as_text(user, f"{place}: {layout.owner}"), f"{place}: {layout.names}"
        yield Listing(row, owner, [as_name(names, where)] if layout.alone else as_names(names, where))


def _columns(path: Path) -> list[str]:
    """The names of the columns, of an object in the first line. Empty if they cannot be read, which reading the rows then says."""
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as mapped:
                return list(pa.ipc.open_file(mapped).schema.names)
        with opened(path) as file:
            line = next((line for line in file if line.strip()), b"").decode("utf-8-sig")
        return list(json.loads(line)) if plain_suffix(path) == ".jsonl" else [name.strip() for name in next(csv.reader([line]))]
    except (OSError, ValueError, RecursionError, TypeError, StopIteration, csv.Error, pa.ArrowInvalid):
        return []


def place_of(path: Path, row: int) -> str:
    """`histories.csv:3`, or `histories.parquet, row 3`."""
    return f"{path}, row {row}" if path.suffix in _TABLES else f"{path}:{row}"


def as_name(value: Any, place: str) -> str:
    """A text or a whole number as text. Raises UserError for anything else, and for an empty text."""
    if type(value) is str and value:
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    what = "is missing" if value is None else "is empty" if value == "" else f"is {json.dumps(value, default=str)[:60]}"
    raise UserError(f"{place} {what}; give a text or a whole number")


def as_text(value: Any, place: str) -> str:
    """As as_name, for what is written again. Raises UserError for half characters too, which no file can hold."""
    text = as_name(value, place)
    if not text.isascii() and HALF_CHARACTER.search(text):
        raise UserError(f"{place} holds half a character ({ascii(text)[:60]}), which is no text; write it again")
    return text


def as_names(value: Any, place: str) -> list[str]:
    """A list of names as texts; from Python also a tuple, an array or a column. Raises UserError if it is none."""
    if isinstance(value, tuple):
        value = list(value)
    elif not isinstance(value, list) and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list):
        what = "is missing" if value is None else f"is {json.dumps(value, default=str)[:60]}, no list"
        raise UserError(f"{place} {what}; give a list of ids or titles, which may be empty")
    if all(type(name) is str for name in value):
        return value
    return [as_name(name, f"{place}[{number}]") for number, name in enumerate(value)]


def _text(path: Path, layout: _Layout) -> Iterator[tuple[int, Any, Any]]:
    is_table, owner = plain_suffix(path) == ".csv", ""

    def check_names(names: list[str]) -> None:
        nonlocal owner
        owner = _checked_owner(f"{path}:1", names, layout) if is_table else _owner(f"{path}:1", names, layout)

    for record in read_text_records(path, check_names):
        place = f"{path}:{record.line}"
        if record.fault is not None:
            what = "put cells with a comma in quotes" if is_table else f"write {_shown(layout)} on each line"
            raise UserError(f"{place}: {record.fault} ({record.text[:60]!r}); {what}")
        names: Any = record.fields.get(layout.names)
        is_cell = is_table and not layout.alone
        yield record.line, record.fields.get(owner), _cell(names, f"{place}: {layout.names}") if is_cell else names


def _shown(layout: _Layout) -> str:
    return f'{{"{layout.owner}": ..., "{layout.names}": {"..." if layout.alone else "[...]"}}}'


def _cell(text: str, place: str) -> Any:
    """The names in one cell of text: a list as JSON or as a Python literal, or names with | between."""
    text = text.strip()
    if not text.startswith("["):
        return [name.strip() for name in text.split(_SEPARATOR)] if text else []
    try:
        found = parsed_list(text, whole_numbers=True)
    except NoListError as fault:
        raise UserError(f"{place}: {fault}; correct it") from None
    if found is None:
        raise UserError(f"{place} begins like a JSON list and is none ({text[:60]!r}); correct it")
    return found


def _parquet(path: Path, layout: _Layout) -> Iterator[tuple[int, Any, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            owner = _checked_owner(str(path), file.schema_arrow.names, layout)
            yield from _table(path, file.iter_batches(_BATCH_ROWS, columns=[owner, layout.names]), owner, layout)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as fault:
        raise UserError(f"{path} is not a Parquet file ({one_line(fault)}); write the file again") from None


def _arrow(path: Path, layout: _Layout) -> Iterator[tuple[int, Any, Any]]:
    try:
        with pa.memory_map(str(path)) as mapped:
            reader = pa.ipc.open_file(mapped)
            owner = _checked_owner(str(path), reader.schema.names, layout)
            whole = (reader.get_batch(number) for number in range(reader.num_record_batches))
            parts = (batch.slice(at, _BATCH_ROWS) for batch in whole for at in range(0, len(batch), _BATCH_ROWS))
            yield from _table(path, parts, owner, layout)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as fault:
        raise UserError(f"{path} is not an Arrow file ({one_line(fault)}); write the file again") from None


def _table(path: Path, batches: Iterable[pa.RecordBatch], owner: str, layout: _Layout) -> Iterator[tuple[int, Any, Any]]:
    row = 0
    for batch in batches:
        for user, names in zip(batch[owner].to_pylist(), batch[layout.names].to_pylist(), strict=True):
            row += 1
            is_cell = isinstance(names, str) and not layout.alone
            yield row, user, _cell(names, f"{place_of(path, row)}: {layout.names}") if is_cell else names


def _checked_owner(place: str, header: list[str], layout: _Layout) -> str:
    refuse_twins(place, header)
    owner = _owner(place, header, layout)
    for name in (owner, layout.names):
        if name not in header:
            raise UserError(f"{place}: the column {name} is missing; its columns are {listed(header)}")
    return owner


def _owner(place: str, header: list[str], layout: _Layout) -> str:
    return user_column(place, header) if layout.owner == "user_id" else layout.owner
