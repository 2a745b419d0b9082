"""Files cut into blocks of whole rows, so that a source is read in pieces of bounded size, by several processes, in any order.

A block is a range of bytes (text) or of row groups (Parquet). A text block ends at the end of a row: at any line end, or where
quoted cells may hold line ends (RFC 4180) at one outside quotes. Cost of cutting: one look a block; with quotes a scan of the file,
about 1 GB/s, and ten million quotes a second in a stretch where one stands inside a cell without quotes (12" Records).
"""

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from rec_dist.errors import UserError

PACKED = ".gz"
_SCAN_BYTES = 1 << 22
GZIP_FAULTS = (OSError, EOFError, zlib.error)  # a flipped byte is met by zlib, which has an exception of its own


@dataclass(frozen=True)
class Block:
    """Bytes (or row groups) begin..end of a file; end None is its end. file: its place among the files read. data: where the
    bytes lie: `path`, which faults name, or an unpacked copy."""

    file: int
    path: Path
    data: Path
    begin: int
    end: int | None


def files_of(source: Path) -> list[Path]:
    """What lies in a folder, without the folders in it, in the order of the names; a file stands for itself."""
    return sorted(path for path in source.iterdir() if not path.is_dir()) if source.is_dir() else [source]


def is_packed(path: Path) -> bool:
    """Whether a file is packed by gzip, by its name."""
    return path.suffix == PACKED


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds: `.csv` of log.csv and of log.csv.gz."""
    return path.with_suffix("").suffix if is_packed(path) else path.suffix


def read_buffer(path: Path, begin: int = 0, end: int | None = None) -> pa.Buffer:
    """Bytes begin..end of a file: a view of the mapped file; of a packed file, its unpacked bytes. UserError: no such file."""
    if not path.is_file():
        raise UserError(f"data.source: the file {path} does not exist; give a folder that holds it.")
    if is_packed(path):
        try:
            data = pa.py_buffer(gzip.decompress(path.read_bytes()))
        except GZIP_FAULTS as fault:
            raise UserError(f"{path} cannot be unpacked ({fault}); fetch the file again.") from None
    else:
        data = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
    return data.slice(begin, (data.size if end is None else end) - begin)


def first_bytes(path: Path, size: int = 1 << 16) -> bytes:
    """The first `size` bytes of a file, unpacked."""
    if not path.is_file():
        raise UserError(f"data.source: the file {path} does not exist; give a folder that holds it.")
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as handle:
            return handle.read(size)
    except GZIP_FAULTS as fault:
        raise UserError(f"{path} cannot be unpacked ({fault}); fetch the file again.") from None


def unpack(path: Path, target: Path) -> None:
    """Writes the unpacked bytes of a .gz file to `target`, a chunk at a time."""
    with target.open("wb") as plain:
        for data in _unpacked(path):
            plain.write(data)  # a full disk is met here, and is no fault of the source


def _unpacked(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as packed:
            while data := packed.read(_SCAN_BYTES):
                yield data
    except GZIP_FAULTS as fault:
        raise UserError(f"{path} cannot be unpacked ({fault}); fetch the file again.") from None


def whole(file: int, path: Path, begin: int = 0) -> Block:
    """All of a file from byte `begin` on, as one block."""
    return Block(file, path, path, begin, None)


def cut_text(block: Block, *, quoted_after: str | None, size: int) -> list[Block]:
    """Cuts a block that is a whole text file into blocks of about `size` bytes. quoted_after: the separator of a file whose cells may
    be quoted and then hold line ends; None where a quote means itself."""
    total = block.data.stat().st_size
    edges = [block.begin]
    with block.data.open("rb") as handle:
        find = _line_end(handle) if quoted_after is None else _quoted_row_end(handle, block.begin, quoted_after)
        while edges[-1] + size < total:
            edges.append(find(edges[-1] + size))
    edges += [total] if edges[-1] < total else []
    return [Block(block.file, block.path, block.data, begin, end) for begin, end in pairwise(edges)]


def _line_end(handle: BinaryIO) -> Callable[[int], int]:
    """A function that gives the place behind the first line end at or after a place."""

    def find(place: int) -> int:
        handle.seek(place)
        return place + len(handle.readline())

    return find


def _quoted_row_end(handle: BinaryIO, begin: int, delimiter: str) -> Callable[[int], int]:
    """A function like that of _line_end that is asked for ever later places, and passes over line ends inside quotes."""
    counted, quotes = begin, _Quotes(delimiter)

    def find(place: int) -> int:
        nonlocal counted
        for data in _chunks(handle, counted, place):
            quotes.pass_over(data)
        handle.seek(place)
        while True:
            line = handle.readline()
            place += len(line)
            quotes.pass_over(line)
            if not quotes.inside or not line:
                counted = place
                return place

    return find


class _Quotes:
    """Whether the place behind the bytes passed over so far lies inside a quoted cell.

    A quote opens a cell at its beginning alone; inside one it closes, and opens again where another follows at once. Any other quote
    is a character like others, so that counting them all would be wrong for the rest of the file.
    """

    def __init__(self, delimiter: str) -> None:
        self.inside = False
        self._last, self._closed = ord("\n"), False  # the byte before, and whether it is a quote that closed a cell
        self._ends = np.frombuffer(f'{delimiter}\n\r"'.encode(), dtype=np.uint8)

    def pass_over(self, data: bytes) -> None:
        """Bytes that follow those of the call before."""
        if not data:
            return
        if b'"' in data:
            self._pass_quotes(np.frombuffer(data, dtype=np.uint8))
        else:
            self._closed = False
        self._last = data[-1]

    def _pass_quotes(self, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        at = np.flatnonzero(data == ord('"'))
        before = np.where(at > 0, data[at - 1], self._last)
        behind = data[np.minimum(at + 1, len(data) - 1)]
        opening, closing = slice(int(self.inside), None, 2), slice(1 - int(self.inside), None, 2)
        if np.isin(before[opening], self._ends).all() and np.isin(behind[closing], self._ends).all():
            self.inside ^= bool(len(at) % 2)  # they open and close in turn
            self._closed = not self.inside and int(at[-1]) == len(data) - 1
            return
        closed_at = -1 if self._closed else -2
        may_open = np.isin(before, self._ends[:-1]).tolist()
        for place, opens in zip(at.tolist(), may_open, strict=True):
            if self.inside:
                self.inside, closed_at = False, place
            elif opens or place == closed_at + 1:
                self.inside = True
        self._closed = closed_at == len(data) - 1


def _chunks(handle: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    handle.seek(begin)
    while begin < end:
        data: bytes = handle.read(min(_SCAN_BYTES, end - begin))
        begin += len(data)
        yield data


def moved(block: Block, unpacked: Mapping[Path, Path]) -> Block:
    """The same block, read from the unpacked copy of its file where there is one."""
    return Block(block.file, block.path, unpacked.get(block.path, block.data), block.begin, block.end)
