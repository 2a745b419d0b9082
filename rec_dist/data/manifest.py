"""manifest.json of a prepared data set: what it was made from, what it holds, and a hash of every file.

Why hashes: a flipped byte in the body of an Arrow file reads without an error and passes Arrow's own validation. Cost
of `verify`: reading everything once, about 1 GB/s.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rec_dist.data.schema import (
    FORMAT_VERSION,
    ITEM_SCHEMA,
    ITEMS_NAME,
    MANIFEST_NAME,
    SEQUENCE_SCHEMA,
    SPLITS,
)
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.files import fingerprint, sha256, write_json


@dataclass(frozen=True)
class FileEntry:
    """One file: its name inside its folder, rows (0 for a raw source), bytes, SHA-256 in hex."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """One split: rows (users), targets (positions from first_target on) and its shards in row order."""

    rows: int
    targets: int
    shards: list[FileEntry]


@dataclass(frozen=True)
class Manifest:
    """Everything manifest.json says.

    fingerprint: of the settings and the hashes of the sources; equal means that `prepare` would write the same data set.
    settings: the resolved fields of the section `data` that shape the result. cuts: timestamps where validation and
    test begin, if any. counts: rows, users and items kept and dropped, each under its own name. tie_share: of choices
    that have a choice of the same user before them, the share with the same timestamp; their order is the file's, not
    time's.
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
    items: FileEntry
    splits: dict[str, SplitEntry]

    def save(self, folder: Path) -> None:
        """Writes manifest.json into `folder`, whole or not at all."""
        body = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_json(folder / MANIFEST_NAME, {**body, "checksum": fingerprint(body)})

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Reads manifest.json. UserError: it is missing, damaged, edited, or of another format version."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise UserError(
                f"data.path ({folder}) holds no prepared data set ({MANIFEST_NAME} is missing); run `rec-dist prepare CONFIG`."
            )
        remedy = "remove the folder and run `rec-dist prepare CONFIG` again."
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            version, checksum = body.pop("format_version"), body.pop("checksum")
        except (ValueError, KeyError, AttributeError, TypeError) as fault:
            raise UserError(f"{path} is no manifest ({fault}); {remedy}") from None
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}; {remedy}")
        if fingerprint({"format_version": version, **body}) != checksum:
            raise UserError(f"{path} does not match its checksum: it was changed after it was written; {remedy}")
        splits = {
            name: SplitEntry(part["rows"], part["targets"], [FileEntry(**shard) for shard in part["shards"]])
            for name, part in body.pop("splits").items()
        }
        sources = [FileEntry(**entry) for entry in body.pop("sources")]
        return Manifest(splits=splits, sources=sources, items=FileEntry(**body.pop("items")), **body)


def describe_file(path: Path, rows: int) -> FileEntry:
    """The entry of a file that lies on disk."""
    return FileEntry(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=sha256(path))


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


def verify(folder: Path, *, hashes: bool = True) -> list[str]:
    """What is wrong with a prepared data set, one line a fault; an empty list means that it is as it was written.

    Checks the manifest, and for each file: it exists, its size, its SHA-256 (hashes=False leaves out this slow part),
    its schema and row count; and that no other Arrow file lies there.
    """
    try:
        manifest = Manifest.load(folder)
    except UserError as fault:
        return [str(fault)]
    problems = _check_file(folder, manifest.items, ITEM_SCHEMA, hashes)
    named = {ITEMS_NAME}
    for split in SPLITS:
        if split not in manifest.splits:
            problems.append(f"{folder / MANIFEST_NAME}: the split {split} is missing")
            continue
        for shard in manifest.splits[split].shards:
            problems += _check_file(folder, shard, SEQUENCE_SCHEMA, hashes)
            named.add(shard.name)
        rows = sum(shard.rows for shard in manifest.splits[split].shards)
        if rows != manifest.splits[split].rows:
            problems.append(f"{folder / MANIFEST_NAME}: {split} has {manifest.splits[split].rows} rows, its shards {rows}")
    strays = sorted(path.name for path in folder.glob("*.arrow") if path.name not in named)
    return problems + [f"{folder / name}: the manifest does not name this file" for name in strays]


def _check_file(folder: Path, entry: FileEntry, schema: pa.Schema, hashes: bool) -> list[str]:
    path = folder / entry.name
    if not path.is_file():
        return [f"{path}: the file is missing"]
    size = path.stat().st_size
    if size != entry.bytes:
        return [f"{path}: {size} bytes instead of {entry.bytes}"]
    if hashes and (found := sha256(path)) != entry.sha256:
        return [f"{path}: SHA-256 is {found} instead of {entry.sha256}"]
    try:
        table = read_arrow(path)
    except UserError as fault:
        return [str(fault)]
    problems = []
    if not table.schema.equals(schema):
        problems.append(f"{path}: the columns are {table.schema.names} with types of another schema than {schema.names}")
    if table.num_rows != entry.rows:
        problems.append(f"{path}: {table.num_rows} rows instead of {entry.rows}")
    return problems
