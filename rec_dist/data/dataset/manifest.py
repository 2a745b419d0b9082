"""manifest.json of a prepared data set: what it was made from, what it holds, and a hash of every file.

Why hashes: a flipped byte in the body of an Arrow file reads without an error and passes Arrow's own validation.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rec_dist.data.dataset.schema import FORMAT_VERSION, MANIFEST_NAME
from rec_dist.errors import UserError
from rec_dist.storage.files import fingerprint, sha256, write_json
from rec_dist.storage.location import Location

SEQUENCES, PREFERENCES = "sequences", "preferences"


@dataclass(frozen=True)
class FileEntry:
    """One file: its name inside its folder, rows (0 for a raw source), bytes, SHA-256 in hex."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """One split: rows (users), targets (positions from first_target on), its shards in row order, and the index of all their rows.

    Preference rows are targets all, and have no index.
    """

    rows: int
    targets: int
    shards: list[FileEntry]
    index: FileEntry | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything manifest.json says.

    fingerprint: of the settings and the hashes of the sources; equal means that `prepare` would write the same data set.
    settings: the resolved fields of the section `data` that shape the result. cuts: timestamps where validation and
    test begin, if any. counts: rows, users and items kept and dropped, each under its own name. tie_share: of choices
    that have a choice of the same user before them, the share with the same timestamp; their order is the file's, not
    time's. kind: sequences of users, or preference rows, which have no items and train only.
    """

    fingerprint: str
    source: str
    settings: dict[str, Any]
    sources: list[FileEntry]
    cuts: dict[str, int | None]
    counts: dict[str, int]
    bad_rows: dict[str, int]
    tie_share: float
    notes: list[str]
    items: FileEntry | None
    splits: dict[str, SplitEntry]
    kind: str = SEQUENCES

    def save(self, folder: Path) -> None:
        """Writes manifest.json into `folder`, whole or not at all."""
        body = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_json(folder / MANIFEST_NAME, {**body, "checksum": fingerprint(body)})

    @property
    def files(self) -> list[FileEntry]:
        """Every file of the data set but manifest.json."""
        found = [self.items, *(file for part in self.splits.values() for file in (part.index, *part.shards))]
        return [file for file in found if file is not None]

    @staticmethod
    def load(place: Location | Path | str) -> "Manifest":
        """Reads manifest.json. UserError: it is missing, damaged, edited, or of another format version."""
        location = place if isinstance(place, Location) else Location(place)
        path, text = location.name(MANIFEST_NAME), location.read(MANIFEST_NAME)
        if text is None:
            raise UserError(
                f"data.path ({location}) holds no prepared data set ({MANIFEST_NAME} is missing); run `rec-dist prepare CONFIG`."
            )
        remedy = "remove the folder and run `rec-dist prepare CONFIG` again."
        try:
            body = json.loads(text)
            version, checksum = body.pop("format_version"), body.pop("checksum")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
            raise UserError(f"{path} is no manifest ({fault}); {remedy}") from None
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}; {remedy}")
        if fingerprint({"format_version": version, **body}) != checksum:
            raise UserError(f"{path} does not match its checksum: it was changed after it was written; {remedy}")
        try:
            return _parsed(body)
        except (KeyError, TypeError, AttributeError, ValueError) as fault:
            raise UserError(f"{path} has other fields than this release writes ({fault}); {remedy}") from None


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:60]!r} in place of a {kind.__name__}")
    return value


def _file(entry: dict[str, Any]) -> FileEntry:
    """An entry of its fields and their types, which the other checks lean on."""
    found = FileEntry(**entry)
    for value, kind in ((found.name, str), (found.rows, int), (found.bytes, int), (found.sha256, str)):
        _typed(value, kind)
    return found


def _parsed(body: dict[str, Any]) -> Manifest:
    kind = body.pop("kind", SEQUENCES)
    if kind not in (SEQUENCES, PREFERENCES):
        raise KeyError(f"kind {kind}")

    def of_users(entry: dict[str, Any]) -> FileEntry | None:
        return _file(entry) if kind == SEQUENCES else None

    splits = {
        name: SplitEntry(
            _typed(part["rows"], int), _typed(part["targets"], int), [_file(s) for s in part["shards"]], of_users(part["index"])
        )
        for name, part in body.pop("splits").items()
    }
    sources = [_file(entry) for entry in body.pop("sources")]
    for name, kinds in (("fingerprint", str), ("settings", dict), ("counts", dict), ("cuts", dict), ("notes", list)):
        _typed(body[name], kinds)
    return Manifest(splits=splits, sources=sources, items=of_users(body.pop("items")), kind=kind, **body)


def describe_file(path: Path, rows: int) -> FileEntry:
    """The entry of a file that lies on disk."""
    return FileEntry(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=sha256(path))


def changed_file(folder: Path, entries: Iterable[FileEntry]) -> Path | None:
    """The first of these files in `folder` that is gone or has another hash (about 1 GB/s); None where all are as they were."""
    for entry in entries:
        path = folder / entry.name
        if not path.is_file() or sha256(path) != entry.sha256:
            return path
    return None


def read_arrow(path: Path) -> pa.Table:
    """Memory-maps an Arrow file. UserError: it is missing, truncated or no Arrow file."""
    try:
        with pa.memory_map(str(path)) as mapped:
            return pa.ipc.open_file(mapped).read_all()
    except (OSError, pa.ArrowInvalid) as fault:
        reason = " ".join(str(fault).split())
        raise UserError(
            f"{path} cannot be read ({reason}); remove the data set and run `rec-dist prepare CONFIG` again."
        ) from None
