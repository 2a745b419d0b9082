"""Cuts files into blocks of whole rows, so that several processes can read a source in pieces of bounded size, in any order.

A block is a range of bytes (text) or of row groups (Parquet). A text block ends at the end of a row: at any line end, or, if
quoted cells can hold line ends (RFC 4180), at a line end outside quotes. Cost of cutting: one read per block. With quotes, one
scan of the file at about 1 GB/s, or ten million quotes per second where a quote is inside a cell without quotes (12" Records).
"""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa

from rec_dist.data.sources.packed import opened, packing, refuse_no_text
from rec_dist.errors import UserError
from rec_dist.storage.location import Location

_SCAN_BYTES = 1 << 22
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Block:
    """Bytes (or row groups) begin..end of a file; end None means the end of the file.

    file: its place among the files to read. path: the source file, which messages name. data: the file to read, `path` or a
    decompressed copy of it. stored: where a machine without that file finds the same bytes: (the URI of a folder, the name there).
    """

    file: int
    path: Path
    data: Path
    begin: int
    end: int | None
    stored: tuple[str, str] | None = None


def files_of(source: Path) -> list[Path]:
    """The files in a folder, sorted by name, or the file `source` itself."""
    return sorted(path for path in source.iterdir() if not path.is_dir()) if source.is_dir() else [source]


def read_buffer(path: Path, begin: int = 0, end: int | None = None) -> pa.Buffer:
    """Bytes begin..end of a file: a view of the mapped file, or decompressed bytes. Raises UserError if there is no such file."""
    if not path.is_file():
        raise UserError(f"data.source: the file {path} does not exist; give a folder that holds it.")
    if packing(path) is not None:
        with opened(path) as handle:
            data = pa.py_buffer(handle.read())
    else:
        refuse_no_text(path)
        data = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
    return data.slice(begin, (data.size if end is None else end) - begin)


def read_block(block: Block) -> pa.Buffer:
    """The bytes of a block. Raises UserError if this machine does not have the file, UnreachableError if its store fails."""
    if not is_stored_only(block):
        if block.end is not None and block.data.stat().st_size < block.end:
            raise UserError(
                f"{block.path} is shorter on the machine {socket.gethostname()} than where the command runs, or changed while it was "
                "read; give all machines the same file, or a URI (s3://bucket/prefix)."
            )
        return read_buffer(block.data, block.begin, block.end)

    def read(file: Any) -> pa.Buffer:
        file.seek(block.begin)
        return file.read_buffer((file.size() if block.end is None else block.end) - block.begin)

    return in_store(block, read)


def is_stored_only(block: Block) -> bool:
    """Whether the file of a block must be read from its store. Raises UserError if it is neither there nor on this machine."""
    if block.data.is_file():
        return False
    if block.stored is None:
        raise UserError(
            f"data.source: the file {block.path} does not exist on the machine {socket.gethostname()}; give a URI "
            "(s3://bucket/prefix), or a folder that all machines see."
        )
    return True


def in_store(block: Block, read: Callable[[Any], _Found]) -> _Found:
    """What `read` returns for the file of a block, opened in its store."""
    assert block.stored is not None, "is_stored_only"
    place, name = block.stored
    return Location(place, key="data.source").use(name, read)


def first_bytes(path: Path, size: int = 1 << 16) -> bytes:
    """The first `size` bytes of a file, decompressed."""
    with opened(path) as handle:
        return handle.read(size)


def whole(file: int, path: Path, begin: int = 0) -> Block:
    """All of a file from byte `begin` on, as one block."""
    return Block(file, path, path, begin, None)


def cut_text(block: Block, *, quoted_after: str | None, size: int) -> list[Block]:
    """Cuts a block that is a whole text file into blocks of about `size` bytes.

    quoted_after: the separator of a file whose quoted cells can hold line ends; None if a quote is an ordinary character.
    """
    total = block.data.stat().st_size
    edges = [block.begin]
    with block.data.open("rb") as handle:
        find = _line_end(handle) if quoted_after is None else _quoted_row_end(handle, block.begin, quoted_after)
        while edges[-1] + size < total:
            edges.append(find(edges[-1] + size))
    edges += [total] if edges[-1] < total else []
    return [replace(block, begin=begin, end=end) for begin, end in pairwise(edges)]


def _line_end(handle: BinaryIO) -> Callable[[int], int]:
    """Returns a function that finds the place behind the first line end at or after a given place."""

    def find(place: int) -> int:
        handle.seek(place)
        return place + len(handle.readline())

    return find


def _quoted_row_end(handle: BinaryIO, begin: int, delimiter: str) -> Callable[[int], int]:
    """As _line_end, but skips line ends inside quotes. The returned function must be called with ascending places."""
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
    """Tracks whether the place behind the bytes read so far is inside a quoted cell.

    A quote opens a cell only at its beginning. Inside a quoted cell, a quote closes it, and a second quote directly after
    reopens it. Any other quote is an ordinary character; counting it would be wrong for the rest of the file.
    """

    def __init__(self, delimiter: str) -> None:
        self.inside = False
        self._last, self._closed = ord("\n"), False  # the previous byte, and whether it is a quote that closed a cell
        self._ends = np.frombuffer(f'{delimiter}\n\r"'.encode(), dtype=np.uint8)

    def pass_over(self, data: bytes) -> None:
        """Reads bytes that follow those of the previous call."""
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
            self.inside ^= bool(len(at) % 2)  # quotes open and close in turn
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
