"""Files of users with a list of item names each: histories and candidates for `rec-dist rank`. Read row by row.

    .jsonl    {"user_id": "u1", "history": ["101", "Heat"]}       an object a line
    .csv      user_id,history                                     a cell holds a JSON list, or names with | between
    .parquet  user_id: text or whole numbers; history: a list of them, or text as in csv
    .arrow    as .parquet

Or, where the caller allows it, one name a row, with the rows of a user one below another: what `rec-dist rank` writes. The titles
of new items are read in the same way, one a row.

Names stay text as it is written, so `007` is not `7`; whole numbers are written in decimal. Other columns are not read.
Cost: about 5 us a row of 50 names.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rec_dist.data.sources.header import listed, refuse_twins
from rec_dist.errors import UserError

LISTING_SUFFIXES = (".jsonl", ".csv", ".parquet", ".arrow")
_TABLES = (".parquet", ".arrow")
_SEPARATOR = "|"
_SURROGATE = re.compile("[\ud800-\udfff]")
_BATCH_ROWS = 1024


class Listing(NamedTuple):
    """A user and the names of items. row: the line of a text file, or the row of a table, from 1."""

    row: int
    user: str
    names: list[str]


class _Layout(NamedTuple):
    """The columns of the user and of the names. alone: whether a row holds one name, else a list of them."""

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
        yield row, item, titles[0]


def _check_file(path: Path, key: str, *columns: str) -> None:
    if path.suffix not in LISTING_SUFFIXES:
        raise UserError(
            f"{key} ({path}) must end in {', '.join(LISTING_SUFFIXES)}, which says how it is read; rename or convert it"
        )
    if not path.is_file():
        raise UserError(f"{key} ({path}) is no file; give one with the columns {' and '.join(columns)}")


def _listings(path: Path, layout: _Layout) -> Iterator[Listing]:
    read = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow}[path.suffix]
    for row, user, names in read(path, layout):
        place = place_of(path, row)
        owner, where = as_user(user, f"{place}: {layout.owner}"), f"{place}: {layout.names}"
        yield Listing(row, owner, [as_name(names, where)] if layout.alone else as_names(names, where))


def _columns(path: Path) -> list[str]:
    """The names of the columns, of an object in the first line. Empty if they cannot be read, which reading the rows then says."""
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as mapped:
                return list(pa.ipc.open_file(mapped).schema.names)
        with path.open(encoding="utf-8-sig") as file:
            line = next((line for line in file if line.strip()), "")
        return list(json.loads(line)) if path.suffix == ".jsonl" else [name.strip() for name in next(csv.reader([line]))]
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
    raise UserError(f"{place} {what}; give an id as text or as a whole number")


def as_user(value: Any, place: str) -> str:
    """As as_name, for an id that is written again. Raises UserError for half characters too, which no file can hold."""
    user = as_name(value, place)
    if not user.isascii() and _SURROGATE.search(user):
        raise UserError(f"{place} holds half a character ({ascii(user)[:60]}), which is no text; write the id again")
    return user


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


def _jsonl(path: Path, layout: _Layout) -> Iterator[tuple[int, Any, Any]]:
    with path.open("rb") as file:
        for row, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as fault:
                raise UserError(f"{path}:{row} is no JSON ({' '.join(str(fault).split())}); give an object a line") from None
            if not isinstance(fields, dict):
                shown = f'{{"{layout.owner}": ..., "{layout.names}": {"..." if layout.alone else "[...]"}}}'
                raise UserError(f"{path}:{row} is no JSON object; write {shown} on each line")
            yield row, fields.get(layout.owner), fields.get(layout.names)


def _csv(path: Path, layout: _Layout) -> Iterator[tuple[int, Any, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            refuse_twins(f"{path}:1", header)
            _require(f"{path}:1", header, layout)
            user, names = header.index(layout.owner), header.index(layout.names)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}:{reader.line_num} has {len(cells)} cells and the header {len(header)}; put cells with a comma "
                        "in quotes"
                    )
                cell, place = cells[names], f"{path}:{reader.line_num}: {layout.names}"
                yield reader.line_num, cells[user], cell if layout.alone else _cell(cell, place)
    except csv.Error as fault:
        raise UserError(f"{path}:{reader.line_num} cannot be read as csv ({fault}); write the rows as JSON lines") from None
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is no UTF-8 text ({fault}); save it as UTF-8") from None


def _cell(text: str, place: str) -> Any:
    """The names in one cell of text: a JSON list, or names with | between."""
    if not text.startswith("["):
        return [name.strip() for name in text.split(_SEPARATOR)] if text.strip() else []
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{place} begins like a JSON list and is none ({' '.join(str(fault).split())}); correct it") from None


def _parquet(path: Path, layout: _Layout) -> Iterator[tuple[int, Any, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow, layout)
            yield from _table(path, file.iter_batches(_BATCH_ROWS, columns=[layout.owner, layout.names]), layout)
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as fault:
        raise UserError(f"{path} is not a Parquet file ({' '.join(str(fault).split())}); write the file again") from None


def _arrow(path: Path, layout: _Layout) -> Iterator[tuple[int, Any, Any]]:
    try:
        with pa.memory_map(str(path)) as mapped:
            reader = pa.ipc.open_file(mapped)
            _check_names(path, reader.schema, layout)
            whole = (reader.get_batch(number) for number in range(reader.num_record_batches))
            yield from _table(
                path, (batch.slice(at, _BATCH_ROWS) for batch in whole for at in range(0, len(batch), _BATCH_ROWS)), layout
            )
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as fault:
        raise UserError(f"{path} is not an Arrow file ({' '.join(str(fault).split())}); write the file again") from None


def _check_names(path: Path, schema: pa.Schema, layout: _Layout) -> None:
    refuse_twins(path, schema.names)
    _require(str(path), schema.names, layout)


def _table(path: Path, batches: Iterable[pa.RecordBatch], layout: _Layout) -> Iterator[tuple[int, Any, Any]]:
    row = 0
    for batch in batches:
        read = _reader(batch[layout.names].type)
        for user, names in zip(batch[layout.owner].to_pylist(), batch[layout.names].to_pylist(), strict=True):
            row += 1
            yield row, user, names if layout.alone else read(names, f"{path}, row {row}: {layout.names}")


def _reader(kind: pa.DataType) -> Callable[[Any, str], Any]:
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return lambda names, place: _cell(names, place) if is_text and names is not None else names


def _require(place: str, header: list[str], layout: _Layout) -> None:
    for name in (layout.owner, layout.names):
        if name not in header:
            raise UserError(f"{place}: the column {name} is missing; its columns are {listed(header)}")
