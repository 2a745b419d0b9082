"""Files cut into blocks of whole rows, so that a source is read in pieces of bounded size, by several processes, in any order.

A block is a range of bytes (text) or of row groups (Parquet). A text block ends at the end of a row: at any line end, or where
quoted cells may hold line ends (RFC 4180) at one with an even number of quotes before it. Cost of cutting: one look a block;
with quotes a scan of the file, about 1 GB/s.
"""

import gzip
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from rec_dist.runtime.errors import UserError

PACKED = ".gz"
_SCAN_BYTES = 1 << 22
_GZIP_FAULTS = (OSError, EOFError)


@dataclass(frozen=True)
class Block:
    """Bytes (or row groups) begin..end of a file; end None is its end. file: its place among the files read. data: where the
    bytes lie: `path`, which faults name, or an unpacked copy."""

    file: int
    path: Path
    data: Path
    begin: int
    end: int | None


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
        except _GZIP_FAULTS as fault:
            raise UserError(f"{path} cannot be unpacked ({fault}); fetch the file again.") from None
    else:
        data = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
    return data.slice(begin, (data.size if end is None else end) - begin)


def first_bytes(path: Path) -> bytes:
    """The first 64 KiB of a file, unpacked."""
    if not path.is_file():
        raise UserError(f"data.source: the file {path} does not exist; give a folder that holds it.")
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as handle:
            return handle.read(1 << 16)
    except _GZIP_FAULTS as fault:
        raise UserError(f"{path} cannot be unpacked ({fault}); fetch the file again.") from None


def unpack(path: Path, target: Path) -> None:
    """Writes the unpacked bytes of a .gz file to `target`, a chunk at a time."""
    try:
        with gzip.open(path) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, _SCAN_BYTES)
    except _GZIP_FAULTS as fault:
        raise UserError(f"{path} cannot be unpacked ({fault}); fetch the file again.") from None


def whole(file: int, path: Path, begin: int = 0) -> Block:
    """All of a file from byte `begin` on, as one block."""
    return Block(file, path, path, begin, None)


def cut_text(block: Block, *, quoted: bool, size: int) -> list[Block]:
    """Cuts a block that is a whole text file into blocks of about `size` bytes. quoted: cells may hold line ends."""
    total = block.data.stat().st_size
    edges = [block.begin]
    with block.data.open("rb") as handle:
        find = _quoted_row_end(handle, block.begin) if quoted else lambda place: _line_end(handle, place)
        while edges[-1] + size < total:
            edges.append(find(edges[-1] + size))
    edges += [total] if edges[-1] < total else []
    return [Block(block.file, block.path, block.data, begin, end) for begin, end in pairwise(edges)]


def _line_end(handle: BinaryIO, place: int) -> int:
    """The place behind the first line end at or after `place`."""
    handle.seek(place)
    return place + len(handle.readline())


def _quoted_row_end(handle: BinaryIO, begin: int) -> Callable[[int], int]:
    """A function like _line_end that is asked for ever later places, and passes over line ends inside quotes."""
    counted, quotes = begin, 0

    def find(place: int) -> int:
        nonlocal counted, quotes
        for data in _chunks(handle, counted, place):
            quotes += data.count(b'"')
        handle.seek(place)
        while True:
            line = handle.readline()
            place += len(line)
            quotes += line.count(b'"')
            if quotes % 2 == 0 or not line:
                counted = place
                return place

    return find


def _chunks(handle: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    handle.seek(begin)
    while begin < end:
        data: bytes = handle.read(min(_SCAN_BYTES, end - begin))
        begin += len(data)
        yield data


def moved(block: Block, unpacked: Mapping[Path, Path]) -> Block:
    """The same block, read from the unpacked copy of its file where there is one."""
    return Block(block.file, block.path, unpacked.get(block.path, block.data), block.begin, block.end)
