"""Files of users with a list of item names each: histories and candidates for `rec-dist rank`. Read row by row.

    .jsonl    {"user_id": "u1", "history": ["101", "Heat"]}       an object a line
    .csv      user_id,history                                     a cell holds a JSON list, or names with | between
    .parquet  user_id: text or whole numbers; history: a list of them, or text as in csv

The user may have any of the names in roles.py, and text files may be packed. Names stay text as it is written, so `007` is not `7`;
whole numbers are written in decimal. Other columns are not read. Cost: about 5 us a row of 50 names.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rec_dist.data.sources.header import listed, refuse_twins
from rec_dist.data.sources.packed import SUFFIXES as PACKED
from rec_dist.data.sources.packed import opened, plain_suffix
from rec_dist.data.sources.roles import user_column
from rec_dist.data.sources.text import NoListError, parsed_list
from rec_dist.errors import UserError

LISTING_SUFFIXES = (".jsonl", ".csv", ".parquet")
_SEPARATOR = "|"
_SURROGATE = re.compile("[\ud800-\udfff]")
_BATCH_ROWS = 1024


class Listing(NamedTuple):
    """A user and the names of items. row: the line of a text file, or the row of a Parquet file, from 1."""

    row: int
    user: str
    names: list[str]


def read_listings(path: Path, column: str, key: str) -> Iterator[Listing]:
    """The rows of a file in order. column: the one that holds the names. key: the option that names the file.

    Raises UserError, with file, line and column, for a file or a row that cannot be read.
    """
    kind = plain_suffix(path)
    if kind not in LISTING_SUFFIXES:
        raise UserError(
            f"{key} ({path}) must end in {', '.join(LISTING_SUFFIXES)} (packed: {', '.join(PACKED)} behind it), which says how it is "
            "read; rename or convert it"
        )
    if not path.is_file():
        raise UserError(f"{key} ({path}) is no file; give one with the columns user_id and {column}")
    read = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[kind]
    for row, user, names in read(path, column):
        place = place_of(path, row)
        yield Listing(row, as_user(user, f"{place}: user_id"), as_names(names, f"{place}: {column}"))


def place_of(path: Path, row: int) -> str:
    """`histories.csv:3`, or `histories.parquet, row 3`."""
    return f"{path}, row {row}" if path.suffix == ".parquet" else f"{path}:{row}"


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


def _jsonl(path: Path, column: str) -> Iterator[tuple[int, Any, Any]]:
    user = None
    with opened(path) as file:
        for row, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as fault:
                raise UserError(f"{path}:{row} is no JSON ({' '.join(str(fault).split())}); give an object a line") from None
            if not isinstance(fields, dict):
                raise UserError(f'{path}:{row} is no JSON object; write {{"user_id": ..., "{column}": [...]}} on each line')
            user = user or user_column(f"{path}:{row}", list(fields))
            yield row, fields.get(user), fields.get(column)


def _csv(path: Path, column: str) -> Iterator[tuple[int, Any, Any]]:
    try:
        with opened(path) as file:
            reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
            header = [name.strip() for name in next(reader, [])]
            refuse_twins(f"{path}:1", header)
            user = header.index(user_column(f"{path}:1", header))
            _require(f"{path}:1", header, column)
            names = header.index(column)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}:{reader.line_num} has {len(cells)} cells and the header {len(header)}; put cells with a comma "
                        "in quotes"
                    )
                yield reader.line_num, cells[user], _cell(cells[names], f"{path}:{reader.line_num}: {column}")
    except csv.Error as fault:
        raise UserError(f"{path}:{reader.line_num} cannot be read as csv ({fault}); write the rows as JSON lines") from None
    except UnicodeDecodeError as fault:
        raise UserError(f"{path} is no UTF-8 text ({fault}); save it as UTF-8") from None


def _cell(text: str, place: str) -> Any:
    """The names in one cell of text: a list as JSON or as a Python literal, or names with | between."""
    if not text.startswith("["):
        return [name.strip() for name in text.split(_SEPARATOR)] if text.strip() else []
    try:
        found = parsed_list(text, whole_numbers=True)
    except NoListError as fault:
        raise UserError(f"{place}: {fault}; correct it") from None
    if found is None:
        raise UserError(f"{place} begins like a JSON list and is none ({text[:60]!r}); correct it")
    return found


def _parquet(path: Path, column: str) -> Iterator[tuple[int, Any, Any]]:
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            refuse_twins(path, schema.names)
            user_name = user_column(path, schema.names)
            _require(str(path), schema.names, column)
            read = _reader(schema.field(column).type)
            for batch in file.iter_batches(_BATCH_ROWS, columns=[user_name, column]):
                for user, names in zip(batch[user_name].to_pylist(), batch[column].to_pylist(), strict=True):
                    row += 1
                    yield row, user, read(names, f"{path}, row {row}: {column}")
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as fault:
        raise UserError(f"{path} is not a Parquet file ({' '.join(str(fault).split())}); write the file again") from None


def _reader(kind: pa.DataType) -> Callable[[Any, str], Any]:
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return lambda names, place: _cell(names, place) if is_text and names is not None else names


def _require(place: str, header: list[str], column: str) -> None:
    if column not in header:
        raise UserError(f"{place}: the column {column} is missing; its columns are {listed(header)}")
