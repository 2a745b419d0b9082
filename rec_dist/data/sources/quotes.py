"""Whether the quotes of a delimited file are as RFC 4180 has them, by a scan of the whole file before it is read.

There a quote opens a cell at its beginning, and its closing quote is followed by a separator or a line end. Text behind it, or a
quote that is never closed, means that a quote was an ordinary character: read as RFC 4180, it swallows the rows up to the next
one. Cost: 1 GB/s, or a million quoted cells per second where one is faulty. Without a quote, the speed of the disk.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from rec_dist.data.sources.packed import unpacked
from rec_dist.runtime.arrays import I64

# none: a quote is an ordinary character. lines: as rfc4180, but every line is a row, and one whose quotes are faulty is bad.
Quoting = Literal["none", "rfc4180", "lines"]

_LONGEST_CELL = 1 << 24  # bytes; a quote that is not closed within them is never closed
_SHOWN = 5
_QUOTE = ord('"')


class _Cells(NamedTuple):
    """The quoted cells of a text: the places of their first and last quotes (C,). faulty: of those quotes with text behind them.

    open: the first quote of a cell that does not end in this text, or None.
    """

    starts: I64
    stops: I64
    faulty: list[int]
    open: int | None


def quoting_of(path: Path, delimiter: str, notes: list[str]) -> Quoting:
    """How to read the quotes of a file. Adds to `notes` what is odd about them, with the first line and the number.

    In text separated by tabs, a cell with line ends and tabs is a fault too, since that is what rows look like.
    """
    faults = line_ends = 0
    first_line_end = None
    places: list[str] = []  # the lines of the first faults
    lines = 1  # the line in which a piece begins
    for text, cells in _pieces(path, delimiter):
        ends = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n")) if len(cells.starts) else cells.starts
        inside = np.searchsorted(ends, cells.stops) - np.searchsorted(ends, cells.starts)
        odd = [(int(cells.starts[cell]), int(cells.stops[cell])) for cell in np.flatnonzero(inside)]
        like_rows = [start for start, stop in odd if delimiter == "\t" and b"\t" in text[start:stop]]
        faulty = sorted({*cells.faulty, *like_rows, *([] if cells.open is None else [cells.open])})
        places += [str(lines + text.count(b"\n", 0, place)) for place in faulty[: _SHOWN - len(places)]]
        if odd and first_line_end is None:
            first_line_end = lines + text.count(b"\n", 0, odd[0][0])
        faults, line_ends, lines = faults + len(faulty), line_ends + int(inside.sum()), lines + text.count(b"\n")
    if faults:
        more = f"{', '.join(places[1:])}{', ...' if faults > len(places) else ''}"
        what = f"{path}:{places[0]}: {faults} quotes are not as RFC 4180 has them (also in line {more})" if more else ""
        what = what or f"{path}:{places[0]}: a quote is not as RFC 4180 has it"
        notes.append(
            f"{what}: quotes are ordinary characters of this file" if delimiter == "\t" else f"{what}: each line is a row"
        )
        return "none" if delimiter == "\t" else "lines"
    if line_ends:
        notes.append(
            f"{path}:{first_line_end}: {line_ends} line ends stand inside quoted cells, the first in the cell in this line"
        )
    return "rfc4180"


def _pieces(path: Path, delimiter: str) -> Iterator[tuple[bytes, _Cells]]:
    """The text of a file in pieces that end at a line end or before a quoted cell, and the quoted cells in each."""
    rest = b""
    for data in unpacked(path):
        text = rest + data
        text, rest = (text[: (cut := text.rfind(b"\n") + 1)], text[cut:])
        cells = _quoted_cells(text, delimiter)
        if cells.open is not None and len(text) - cells.open < _LONGEST_CELL:
            text, rest, cells = text[: cells.open], text[cells.open :] + rest, cells._replace(open=None)
        yield text, cells
    yield rest, _quoted_cells(rest, delimiter)


def _quoted_cells(text: bytes, delimiter: str) -> _Cells:
    """The quoted cells of a text that begins outside of one. Two quotes inside a cell are one ordinary quote."""
    none = np.zeros(0, dtype=np.int64)
    if b'"' not in text:
        return _Cells(none, none, [], None)
    data = np.frombuffer(text + b"\n", dtype=np.uint8)
    at = np.flatnonzero(data == _QUOTE)
    may_open = np.frombuffer(f"{delimiter}\n\r".encode(), dtype=np.uint8)
    opens = np.isin(np.where(at > 0, data[at - 1], ord("\n")), may_open)
    closes = np.isin(data[at + 1], may_open)
    doubled = np.zeros(len(at) + 1, dtype=bool)
    doubled[1:-1] = np.diff(at) == 1  # whether quote n stands directly behind quote n - 1
    first, last = at[0::2], at[1::2]
    in_turn = (opens[0::2] | doubled[0:-1:2]).all() and (closes[1::2] | doubled[1:][1::2]).all()
    if not in_turn:
        return _one_by_one(text, at.tolist(), opens.tolist(), f"{delimiter}\n\r".encode())
    begins = ~doubled[0:-1:2]  # a quote directly behind a closing one goes on with the cell
    starts = first[begins]
    stops = last[np.append(begins[1:], True)[: len(last)]] if len(first) == len(last) else last[begins[1:]]
    is_open = len(first) > len(last)
    return _Cells(starts[:-1] if is_open else starts, stops, [], int(starts[-1]) if is_open else None)


def _one_by_one(text: bytes, at: list[int], opens: list[bool], ends: bytes) -> _Cells:
    starts: list[int] = []
    stops: list[int] = []
    faulty: list[int] = []
    inside, closed_at = False, -2
    for place, may_open in zip(at, opens, strict=True):
        if inside:
            inside, closed_at = False, place
        elif place == closed_at + 1:
            inside = True
            continue
        elif may_open:
            starts.append(place)
            inside = True
            continue
        else:
            continue
        if text[place + 1 : place + 2] == b'"':
            continue
        stops.append(place)
        behind = text[place + 1 : place + 1 + _LONGEST_CELL].lstrip(b" ")[:1]
        if behind and behind not in ends:
            faulty.append(starts[-1])
    is_open = len(starts) > len(stops)
    return _Cells(
        np.array(starts[:-1] if is_open else starts, dtype=np.int64),
        np.array(stops, dtype=np.int64),
        faulty,
        starts[-1] if is_open else None,
    )
