"""Lines of JSON objects as columns.

Cost: Arrow's parser reads about 100 MB/s. A block with an invalid line is read line by line, 20 times slower.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from rec_dist.data.sources.interactions import BadRows, UnusableRowError
from rec_dist.data.sources.table import Table
from rec_dist.data.sources.text import HALF_CHARACTER
from rec_dist.runtime.arrays import I64


def read_json(data: pa.Buffer, path: Path, schema: pa.Schema, bad: BadRows, of: str) -> Table:
    """Reads the columns of `schema` from lines of JSON objects. Missing fields are null; an invalid line is a bad row.

    of: what a line should be, for messages. The columns of numbers are text if a line is invalid, to keep each as it is written.
    """
    begins, ends = _lines(data)
    num_lines = len(ends)
    if num_lines:
        try:
            table = pyarrow.json.read_json(
                pa.BufferReader(data),
                read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=max(min(data.size, 2**31 - 1), 1)),
                parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
            table.validate(full=True)  # the parser accepts bytes that are not UTF-8
            if table.num_rows == num_lines and _hold_objects(data, begins, ends):
                return Table(path, schema.names, table.columns, np.arange(1, num_lines + 1, dtype=np.int64), num_lines)
        except pa.ArrowInvalid:
            pass  # a line is invalid or blank: the slow way finds it
    return _line_by_line(data, path, schema, bad, num_lines, of)


def _lines(data: pa.Buffer) -> tuple[I64, I64]:
    """The places at which each line begins, and those of its line feed; that of a last line without one is the end."""
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
    begins = np.append(0, ends + 1)
    return (begins[:-1], ends) if begins[-1] == data.size else (begins, np.append(ends, data.size))


def _hold_objects(data: pa.Buffer, begins: I64, ends: I64) -> bool:
    """Whether every line begins and ends as an object does. Then as many objects as lines are one a line.

    Arrow's parser also takes two objects in a line, and one in two lines, which would move all rows behind them to other lines.
    """
    text = np.frombuffer(data, dtype=np.uint8)
    is_object = (text[begins] == ord("{")) & (text[ends - 1] == ord("}"))
    odd = (
        data.slice(int(begin), int(end - begin)).to_pybytes().strip()
        for begin, end in zip(begins[~is_object], ends[~is_object], strict=True)
    )
    return all(line[:1] == b"{" and line[-1:] == b"}" for line in odd)


def _line_by_line(data: pa.Buffer, path: Path, schema: pa.Schema, bad: BadRows, num_lines: int, of: str) -> Table:
    values: list[list[Any]] = [[] for _ in schema.names]
    lines: list[int] = []
    for number, line in enumerate(io.BytesIO(data.to_pybytes()), start=1):
        if not line.strip():
            continue
        try:
            row = _fields(line, schema, of)
        except UnusableRowError as fault:
            bad.add(str(fault), path, np.array([number]), line.decode("utf-8", errors="replace").strip())
            continue
        lines.append(number)
        for column, value in zip(values, row, strict=True):
            column.append(value)
    kinds = [pa.string() if _is_number(kind) else kind for kind in schema.types]
    columns = [pa.chunked_array([pa.array(column, kind)]) for column, kind in zip(values, kinds, strict=True)]
    return Table(path, schema.names, columns, np.array(lines, dtype=np.int64), num_lines)


def _fields(line: bytes, schema: pa.Schema, of: str) -> list[Any]:
    try:
        fields = json.loads(line)
    except UnicodeDecodeError:
        raise UnusableRowError("not UTF-8 text") from None
    except (ValueError, RecursionError):
        python = line.lstrip()[:2] in (b"{'", b"{u")
        more = " but a Python dict, as in the metadata of 2014" if python else ""
        raise UnusableRowError(f"not a JSON object of a {of}{more}") from None
    if not isinstance(fields, dict):
        raise UnusableRowError(f"not a JSON object of a {of}")
    return [_value(fields.get(name), name, kind) for name, kind in zip(schema.names, schema.types, strict=True)]


def _value(value: Any, name: str, kind: pa.DataType) -> Any:
    """A field as its column takes it, numbers as text. Raises UnusableRowError that names the field and its type."""
    if value is None:
        return None
    found: Any
    if _is_number(kind):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        found, wanted = (_written(value, kind) if fits else None), "a number"
    elif pa.types.is_list(kind):
        fits = isinstance(value, list)
        found, wanted = ([text for text in value if _is_text(text)] if fits else None), "a list"
    elif isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    else:
        found, wanted = (value if _is_text(value) else None), "a text"
    if found is None:
        what = {str: "text", list: "a list", dict: "an object", bool: "true or false"}.get(type(value), "a fraction")
        what = "half a character" if wanted == "a text" and isinstance(value, str) else what
        raise UnusableRowError(f"{name} is {what}, not {wanted}")
    return found


def _written(value: float, kind: pa.DataType) -> str:
    """A number as the fast parser has it in its column: a float for a rating, with infinity for what is too large for one."""
    if not pa.types.is_floating(kind):
        return repr(value)
    try:
        return repr(float(value))
    except OverflowError:
        return "inf" if value > 0 else "-inf"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not HALF_CHARACTER.search(value)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
