"""manifest.json of a prepared data set: what it was made from, what it holds, and a hash of every file.

Hashes are needed because a flipped byte in the body of an Arrow file reads without an error and passes Arrow's own validation.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rec_dist.data.dataset.schema import FORMAT_VERSION, MANIFEST_NAME, PREPARE_AGAIN
from rec_dist.errors import UserError, one_line
from rec_dist.storage.checksums import FileEntry, parse_entry, parse_manifest, write_manifest
from rec_dist.storage.location import Location

SEQUENCES, PREFERENCES = "sequences", "preferences"


@dataclass(frozen=True)
class SplitEntry:
    """One split: its rows (users), targets (positions from first_target on), shards in row order, and the index of all rows.

    In a split of preference rows every row is a target, and there is no index.
    """

    rows: int
    targets: int
    shards: list[FileEntry]
    index: FileEntry | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that manifest.json says.

    fingerprint: of the settings and the hashes of the sources; `prepare` writes the same data set for equal fingerprints.
    settings: the resolved fields of the section `data` that shape the result. cuts: the timestamps at which validation and test
    begin, if any. counts: rows, users and items kept and dropped, each under its own name. tie_share: of the positives that
    follow another positive of their user, the share with the same timestamp as that one. The order of the source file decides
    between them, not time. kind: sequences of users, or preference rows, which have no items and only a train split.
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
        write_manifest(folder / MANIFEST_NAME, FORMAT_VERSION, asdict(self))

    @property
    def files(self) -> list[FileEntry]:
        """Every file of the data set except manifest.json."""
        found = [self.items, *(file for part in self.splits.values() for file in (part.index, *part.shards))]
        return [file for file in found if file is not None]

    @staticmethod
    def load(place: Location | Path | str) -> "Manifest":
        """Reads manifest.json. Raises UserError if it is missing, damaged, edited, or has another format version."""
        location = place if isinstance(place, Location) else Location(place)
        path, text = location.name(MANIFEST_NAME), location.read(MANIFEST_NAME)
        if text is None:
            raise UserError(
                f"data.path ({location}) holds no prepared data set ({MANIFEST_NAME} is missing); run `rec-dist prepare CONFIG`."
            )
        try:
            body = parse_manifest(text, FORMAT_VERSION)
        except ValueError as fault:
            raise UserError(f"{path} {fault}; {PREPARE_AGAIN}.") from None
        try:
            return _parsed(body)
        except (KeyError, TypeError, AttributeError, ValueError) as fault:
            raise UserError(f"{path} has other fields than this release writes ({fault}); {PREPARE_AGAIN}.") from None


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:60]!r} in place of a {kind.__name__}")
    return value


def _parsed(body: dict[str, Any]) -> Manifest:
    kind = body.pop("kind")
    if kind not in (SEQUENCES, PREFERENCES):
        raise KeyError(f"kind {kind}")

    def of_users(entry: dict[str, Any]) -> FileEntry | None:
        return parse_entry(entry) if kind == SEQUENCES else None

    def split(part: dict[str, Any]) -> SplitEntry:
        rows, targets = _typed(part["rows"], int), _typed(part["targets"], int)
        return SplitEntry(rows, targets, [parse_entry(shard) for shard in part["shards"]], of_users(part["index"]))

    splits = {name: split(part) for name, part in body.pop("splits").items()}
    sources = [parse_entry(entry) for entry in body.pop("sources")]
    mappings = ("settings", "counts", "cuts", "bad_rows")
    for name, kinds in (
        ("fingerprint", str),
        ("source", str),
        ("tie_share", float),
        ("notes", list),
        *((n, dict) for n in mappings),
    ):
        _typed(body[name], kinds)
    return Manifest(splits=splits, sources=sources, items=of_users(body.pop("items")), kind=kind, **body)


def read_arrow(path: Path) -> pa.Table:
    """Memory-maps an Arrow file. Raises UserError if it is missing, truncated or not an Arrow file."""
    try:
        with pa.memory_map(str(path)) as mapped:
            return pa.ipc.open_file(mapped).read_all()
    except (OSError, pa.ArrowInvalid) as fault:
        raise UserError(f"{path} cannot be read ({one_line(fault)}); {PREPARE_AGAIN}.") from None
