"""The header of delimited text: the names of its columns, and messages about headers that are none."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rec_dist.data.sources.blocks import first_bytes
from rec_dist.errors import UserError

_LONGEST = 1 << 16  # bytes of the first line, with its end
_SHOWN_COLUMNS = 300  # characters of a list of columns in a message


def read_header(path: Path, delimiter: str, *, quoted: bool) -> tuple[list[str], int]:
    """Reads the column names in the first line, and returns them with the number of bytes of that line.

    Cuts off a type after a colon (RecBole's `user_id:token`) unless `quoted`. Raises UserError if there is no such file, the
    line is empty, a name occurs twice, or the line is not a header of such text.
    """
    line = io.BytesIO(first_bytes(path, _LONGEST)).readline()
    text = line.decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if not text:
        raise UserError(f"{path}:1: the first line is empty; it must name the columns.")
    if "\0" in text:
        what = "is UTF-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "holds NUL bytes, as UTF-16 does"
        raise UserError(f"{path}:1: the first line {what}; save the file as UTF-8 text.")
    if "\r" in text:
        raise UserError(f"{path}:1: lines end with a carriage return only; save the file with line feeds.")
    if len(line) == _LONGEST and not line.endswith(b"\n"):
        raise UserError(f"{path}:1: the first line is longer than {_LONGEST} bytes; it must name the columns.")
    if quoted and text.count('"') % 2:
        raise UserError(f"{path}:1: a quote in the first line is never closed; name each column within the line.")
    cells = next(csv.reader([text], delimiter=delimiter)) if quoted else text.split(delimiter)
    names = [cell.strip() if quoted else cell.strip().partition(":")[0] for cell in cells]
    refuse_twins(f"{path}:1", names)
    if len(names) == 1:
        _refuse_separator(path, text, delimiter)
    return names, len(line)


def _refuse_separator(path: Path, text: str, delimiter: str) -> None:
    """Raises UserError if a header that is one name with `delimiter` would be several with another separator."""
    for separator, name in ((",", "commas"), (";", "semicolons"), ("\t", "tabs"), ("|", "|"), ("::", "::"), (None, "blanks")):
        if separator != delimiter and len(text.split(separator)) > 1:
            wanted = {"\t": "tabs", ",": "commas"}.get(delimiter, delimiter)
            raise UserError(f"{path}:1: the columns are separated by {name}, not by {wanted}; write the file with {wanted}.")


def refuse_twins(place: str | Path, names: Sequence[str]) -> None:
    """Raises UserError if two columns have the same name, since one of them would be lost."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{place}: two columns are named {name!r}; rename one.")


def listed(header: Sequence[str]) -> str:
    """The names of columns for a message, shortened if there are many."""
    text = ", ".join(header)
    return text if len(text) <= _SHOWN_COLUMNS else f"{text[:_SHOWN_COLUMNS]}... ({len(header)} in all)"


def require_columns(path: Path, header: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises UserError if one of `wanted` is not in the header of `path`."""
    for name in wanted:
        if name not in header:
            raise UserError(f"{path}:1: the column {name!r} is missing; its columns are {listed(header)}.")
