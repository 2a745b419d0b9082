"""Rows of text that are read one by one, as objects of fields: csv, tsv, JSON lines and JSON arrays. One set of rules for all.

Files are UTF-8, may begin with a byte order mark, and may be packed. A line of JSON ends at a line feed only: U+2028 and U+0085 are
ordinary characters of a text. Quotes of csv are those of RFC 4180. A row that cannot be read says why, and the reader goes on; text
that cannot be cut into rows (quotes that are none, another encoding in csv) is an error of the file. Cost: about 2 us a row.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rec_dist.data.sources.blocks import first_bytes
from rec_dist.data.sources.header import refuse_twins
from rec_dist.data.sources.packed import opened, plain_suffix
from rec_dist.data.sources.table import columns_fault
from rec_dist.errors import UserError

TEXT_TABLES, JSON = (".csv", ".tsv"), (".json", ".jsonl")
_BOM = b"\xef\xbb\xbf"
_LONGEST_CELL = 1 << 24  # characters; a list of candidates may be longer than the csv module's own limit of 131,072

csv.field_size_limit(_LONGEST_CELL)

Names = Callable[[list[str]], None]


class Record(NamedTuple):
    """A row. line: where it begins, from 1, or its number in a JSON array. fault: why it cannot be used; then text is the row."""

    line: int
    fields: dict[str, Any]
    fault: str | None = None
    text: str = ""


def read_text_records(path: Path, check_names: Names = lambda _: None) -> Iterator[Record]:
    """The rows of a file in order, without blank ones. A .json file that begins with `[` is an array.

    check_names: is called with the names of the columns, or of the fields of the first object. Raises UserError if the file cannot
    be cut into rows, or two columns have one name.
    """
    kind = plain_suffix(path)
    if kind in TEXT_TABLES:
        return _delimited(path, "\t" if kind == ".tsv" else ",", check_names)
    is_array = kind == ".json" and first_bytes(path).removeprefix(_BOM).lstrip().startswith(b"[")
    return _objects(_array(path) if is_array else _lines(path), check_names)


def _delimited(path: Path, delimiter: str, check_names: Names) -> Iterator[Record]:
    before = 0  # lines before the row
    with opened(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            refuse_twins(f"{path}:1", names)
            check_names(names)
            before = reader.line_num
            for cells in reader:
                line, before = before + 1, reader.line_num
                if len(cells) == len(names):
                    yield Record(line, dict(zip(names, cells, strict=True)))
                elif cells:
                    yield Record(line, {}, columns_fault(len(cells), len(names)), delimiter.join(cells))
        except csv.Error as fault:
            raise UserError(
                f"{path}:{before + 1}: this row cannot be read as csv ({fault}); put each cell with a quote in it in quotes, with "
                "that quote doubled, or write the rows as JSON lines."
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{path}:{_first_not_utf8(path)}: this line is not UTF-8 text; save the file as UTF-8.") from None


def _first_not_utf8(path: Path) -> int:
    """The first line that is not UTF-8 text. The decoder reads ahead of the rows, so it does not know."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    raise AssertionError("there is such a line")


def _objects(records: Iterator[tuple[int, Any, str | None, str]], check_names: Names) -> Iterator[Record]:
    named = False
    for number, fields, fault, text in records:
        if isinstance(fields, dict):
            if not named:
                check_names(list(fields))
            named = True
            yield Record(number, fields)
        else:
            shown = text or json.dumps(fields, ensure_ascii=False, default=str)
            yield Record(number, {}, fault or "not a JSON object", shown)


def _lines(path: Path) -> Iterator[tuple[int, Any, str | None, str]]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if not line.strip():
                continue
            text = line.decode("utf-8", errors="replace").strip()
            try:
                yield number, json.loads(line.decode("utf-8")), None, text
            except UnicodeDecodeError:
                yield number, None, "not UTF-8 text", text
            except (ValueError, RecursionError):
                yield number, None, None, text


def _array(path: Path) -> Iterator[tuple[int, Any, str | None, str]]:
    try:
        with opened(path) as file:
            rows = json.loads(file.read().removeprefix(_BOM).decode("utf-8"))
    except (ValueError, RecursionError) as fault:
        if isinstance(fault, UserError):
            raise
        raise UserError(f"{path} cannot be read ({fault}); correct the file.") from None
    for number, fields in enumerate(rows, start=1):
        yield number, fields, None, ""
