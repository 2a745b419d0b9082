"""Checksums: what files held when they were written, and which of them have changed since.

Neither weights nor Arrow files carry a checksum of their own: with one bit flipped they load, and answer a little wrong. So
whoever writes files also writes a manifest with the size and SHA-256 of each, and with a checksum of itself. Cost: 1 s per GB
on one core, once when files are written and again at each check.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.storage.files import fingerprint, json_text, sha256, write_json
from rec_dist.storage.uri import is_below

CHECKSUMS_NAME = "files.json"
WRITE_AGAIN = "remove that folder and run the command that wrote it again; if you changed it yourself, remove files.json in it"
_CHECKSUMS_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written: its name in its folder, its bytes, its SHA-256 in hex, and its rows (0 unless it is a table)."""

    name: str
    bytes: int
    sha256: str
    rows: int = 0

    def damage(self, size: int | None, digest: str | None = None) -> str | None:
        """How a file of `size` bytes (None: no file) and this SHA-256 (None: not compared) differs from the entry, or None."""
        if size is None:
            return "is missing"
        if size != self.bytes:
            return f"has {size} bytes, not {self.bytes}"
        return None if digest in (None, self.sha256) else "has changed since it was written (other SHA-256)"


def describe(path: Path, rows: int = 0) -> FileEntry:
    """The entry of a file that is on disk."""
    return FileEntry(path.name, path.stat().st_size, sha256(path), rows)


def parse_entry(value: Any) -> FileEntry:
    """An entry from JSON, and the only way to one: its name and its hash become paths, so a manifest could point anywhere.

    Raises TypeError if it has other fields, or fields of other types, and ValueError if its name is no plain file name, its hash
    is not 64 hex digits, or a number is negative.
    """
    entry = FileEntry(**value)
    for field, kind in ((entry.name, str), (entry.bytes, int), (entry.sha256, str), (entry.rows, int)):
        if type(field) is not kind:
            raise TypeError(f"{str(field)[:60]!r} in place of a {kind.__name__}")
    if "/" in entry.name or not is_below(entry.name):
        raise ValueError(f"names {entry.name[:60]!r}, which is not the plain name of a file")
    if not _SHA256.fullmatch(entry.sha256):
        raise ValueError(f"has {entry.sha256[:70]!r} in place of the 64 hex digits of a SHA-256")
    if min(entry.bytes, entry.rows) < 0:
        raise ValueError(f"gives {entry.name} {entry.bytes} bytes and {entry.rows} rows")
    return entry


def damage(folder: Path, entries: Iterable[FileEntry]) -> list[str]:
    """Compares files in `folder` with their entries and returns a phrase for each that is missing, resized or changed."""
    phrases = []
    for entry in entries:
        path = folder / entry.name
        size = path.stat().st_size if path.is_file() else None
        fault = entry.damage(size, sha256(path) if size == entry.bytes else None)
        phrases += [f"{entry.name} {fault}"] if fault else []
    return phrases


def write_manifest(path: Path, format_version: int, body: Mapping[str, Any]) -> None:
    """Writes `body` as JSON, together with its format version and a checksum of both."""
    value = json.loads(json.dumps({"format_version": format_version, **body}))
    write_json(path, {**value, "checksum": fingerprint(value)})


def parse_manifest(text: bytes, format_version: int) -> dict[str, Any]:
    """Returns the body that write_manifest wrote.

    Raises ValueError if a byte has changed or the format version is another. Its message continues a sentence that begins with
    the path.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        is_original = text == json_text(value).encode()  # the checksum does not cover white space
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"is not a manifest ({fault})") from None
    if value.get("format_version") != format_version:
        version = str(value.get("format_version"))[:60]
        raise ValueError(f"has format version {version}, this release reads {format_version}")
    checksum = value.pop("checksum", None)
    if checksum != fingerprint(value) or not is_original:
        raise ValueError("does not match its checksum: it was changed after it was written")
    del value["format_version"]
    return value


def read_manifest(path: Path, format_version: int, way_out: str) -> tuple[dict[str, Any], list[FileEntry]]:
    """Reads a manifest that has a list `files`: its body, and the entries of the files.

    Raises UserError with `way_out` if it is damaged or has another format version.
    """
    try:
        body = parse_manifest(path.read_bytes(), format_version)
        return body, [parse_entry(value) for value in body["files"]]
    except OSError as fault:
        raise UserError(f"{path} cannot be read ({fault}); {way_out}") from fault
    except ValueError as fault:
        raise UserError(f"{path} {fault}; {way_out}") from fault
    except (KeyError, TypeError) as fault:
        raise UserError(f"{path} has other fields than were written ({fault}); {way_out}") from fault


def write_checksums(folder: Path) -> None:
    """Writes files.json with an entry for each file that is now in `folder`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS_NAME)
    write_manifest(folder / CHECKSUMS_NAME, _CHECKSUMS_VERSION, {"files": [asdict(describe(path)) for path in files]})


def damaged_files(folder: Path) -> list[str]:
    """Checks `folder` against its files.json and returns a phrase for each damaged file.

    Returns an empty list if there is no files.json, as for external models. Ignores files that were added later. Raises
    UserError if files.json itself is damaged.
    """
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return []
    return damage(folder, read_manifest(path, _CHECKSUMS_VERSION, _way_out(folder))[1])


def verify_checksums(folder: Path) -> None:
    """Raises UserError if a file of a model that we wrote (a run's model/, an export, a converted model) has changed since then.

    Checks nothing if there is no files.json.
    """
    if problems := damaged_files(folder):
        raise UserError(f"{folder}: {problems[0]}; {_way_out(folder)}")


def _way_out(folder: Path) -> str:
    return TRAIN_AGAIN if folder.name == "model" else WRITE_AGAIN
