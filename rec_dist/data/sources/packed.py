"""Compressed files. Their first bytes say how a file is packed, whatever it is called; it is read as a stream of plain bytes.

gzip, bzip2 and xz are read by the standard library, zstd by pyarrow. Archives and workbooks are named and refused.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from rec_dist.errors import UserError, one_line

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # zlib, which meets a flipped byte, has its own exception
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_NO_TEXT = {
    b"PK\x03\x04": ("is a zip archive", "unpack it"),
    b"PK\x05\x06": ("is an empty zip archive", "name another file"),
    b"7z\xbc\xaf\x27\x1c": ("is a 7-Zip archive", "unpack it"),
    b"Rar!": ("is a RAR archive", "unpack it"),
    b"\xd0\xcf\x11\xe0": ("is a workbook or document of Microsoft Office", "save its table as csv"),
    b"PAR1": ("is a Parquet file", "give it the suffix .parquet"),
    b"ARROW1": ("is an Arrow file", "write it as Parquet or csv"),
    b"SQLite format 3": ("is an SQLite database", "write its table as csv"),
    b"\x89HDF": ("is an HDF5 file", "write its table as csv"),
}
_LONGEST_MAGIC = 16
_UNPACKED_BYTES = 1 << 22


def packing(path: Path) -> str | None:
    """How the bytes of a file are packed (gzip, zstd, bzip2, xz), or None."""
    begin = _begin(path)
    return next((name for magic, name in _PACKED.items() if begin.startswith(magic)), None)


def _begin(path: Path) -> bytes:
    with path.open("rb") as handle:
        return handle.read(_LONGEST_MAGIC)


def plain_suffix(path: Path) -> str:
    """The suffix that says what a file holds: `.csv` for both log.csv and log.csv.gz."""
    return path.with_suffix("").suffix if path.suffix in SUFFIXES else path.suffix


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The plain bytes of a file, for a body that only reads. Raises UserError if they are damaged, or no text by their kind."""
    if not path.is_file():
        raise UserError(f"data.source: the file {path} does not exist; give a folder that holds it.")
    try:
        with _stream(path) as handle:
            yield handle
    except UserError:
        raise
    except _FAULTS as fault:
        what = "cannot be read" if packing(path) is None else "cannot be decompressed"
        raise UserError(f"{path} {what} ({one_line(fault)}); download the file again.") from None


def _stream(path: Path) -> BinaryIO:
    kind = packing(path)
    if kind == "gzip":
        return cast(BinaryIO, gzip.open(path))
    if kind == "bzip2":
        return cast(BinaryIO, bz2.open(path))
    if kind == "xz":
        return cast(BinaryIO, lzma.open(path))
    if kind == "zstd":
        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), _UNPACKED_BYTES))
    refuse_no_text(path)
    return path.open("rb")


def refuse_no_text(path: Path) -> None:
    """Raises UserError for a file that is no text by its first bytes: an archive, a workbook, a binary table."""
    begin = _begin(path)
    for magic, (what, way_out) in _NO_TEXT.items():
        if not begin.startswith(magic):
            continue
        if magic == b"PK\x03\x04" and _is_workbook(path):
            what, way_out = "is an Excel workbook", "save its sheet as csv"
        raise UserError(f"{path} {what}, not text; {way_out}.")


def _is_workbook(path: Path) -> bool:
    return path.suffix.lower() in (".xlsx", ".xlsm") or b"[Content_Types].xml" in path.read_bytes()[:4096]


def unpacked(path: Path) -> Iterator[bytes]:
    """The plain bytes of a file, a chunk at a time."""
    with opened(path) as handle:
        while data := handle.read(_UNPACKED_BYTES):
            yield data


def unpack(path: Path, target: Path) -> None:
    """Writes the plain bytes of a packed file to `target`."""
    chunks = unpacked(path)
    with target.open("wb") as plain:
        for data in chunks:
            plain.write(data)  # a full disk fails here, outside of `opened`: it is no fault of the source
