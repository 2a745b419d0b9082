"""Checks of a prepared data set, one line per fault. Cost: listing a folder, or reading all files once at about 1 GB/s."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.data.dataset.index import SplitIndex, index_of_shard, read_index
from rec_dist.data.dataset.manifest import PREFERENCES, Manifest, SplitEntry, read_arrow
from rec_dist.data.dataset.reading import table_fault
from rec_dist.data.dataset.schema import INDEX_SCHEMA, ITEM_SCHEMA, MANIFEST_NAME, PREFERENCE_SCHEMA, SEQUENCE_SCHEMA, SPLITS
from rec_dist.errors import UserError
from rec_dist.storage.checksums import FileEntry
from rec_dist.storage.files import sha256
from rec_dist.storage.location import Location


def folder_faults(location: Location, manifest: Manifest) -> list[str]:
    """The faults that the manifest and a listing of the folder show: missing, resized and stray files, and sums that disagree."""
    problems = []
    manifest_name = location.name(MANIFEST_NAME)
    for split in ("train",) if manifest.kind == PREFERENCES else SPLITS:
        if split not in manifest.splits:
            problems.append(f"{manifest_name}: the split {split} is missing")
            continue
        part = manifest.splits[split]
        rows = sum(shard.rows for shard in part.shards)
        if rows != part.rows:
            problems.append(f"{manifest_name}: {split} has {part.rows} rows, its shards have {rows}")
        if part.index is not None and part.index.rows != part.rows:
            problems.append(f"{manifest_name}: {split} has {part.rows} rows, its index has {part.index.rows}")
    sizes = location.sizes()
    problems += _size_faults(location, manifest, sizes).values()
    strays = {name for name in sizes if name.endswith(".arrow")} - {entry.name for entry in manifest.files}
    return problems + [f"{location.name(name)}: the manifest does not name this file" for name in sorted(strays)]


def _size_faults(location: Location, manifest: Manifest, sizes: dict[str, int]) -> dict[str, str]:
    """The fault of each file that is missing or has another size, by its name."""
    faults = {entry.name: entry.damage(sizes.get(entry.name)) for entry in manifest.files}
    return {name: f"{location.name(name)} {fault}" for name, fault in faults.items() if fault}


def verify(place: Location | Path | str) -> list[str]:
    """Returns everything that is wrong with the data set at `place`; an empty list means that it is exactly as it was written.

    Checks the manifest, and for each file its presence, size, SHA-256, schema and row count. Compares the shards with the index
    of their split, and looks for other Arrow files. Takes nothing from a cache; a remote file is copied to a temporary folder
    while it is checked. Raises UnreachableError if the store does not answer to the end.
    """
    try:
        location = place if isinstance(place, Location) else Location(place)
        manifest = Manifest.load(location)
        problems = folder_faults(location, manifest)
    except UserError as refusal:
        return [str(refusal)]
    broken = set(_size_faults(location, manifest, location.sizes()))  # reported already, so not read
    if manifest.items is not None and manifest.items.name not in broken:
        with _read(location, manifest.items, ITEM_SCHEMA) as (_, fault):
            problems += [fault] if fault else []
    for part in manifest.splits.values():
        problems += _split_faults(location, part, broken)
    return problems


def _split_faults(location: Location, part: SplitEntry, broken: set[str]) -> list[str]:
    """The faults of the index and the shards of a split. Compares shards with the index if there is one and it is whole."""
    schema = PREFERENCE_SCHEMA if part.index is None else SEQUENCE_SCHEMA
    index: SplitIndex | None = None
    problems: list[str] = []
    if part.index is not None and part.index.name not in broken:
        with _read(location, part.index, INDEX_SCHEMA) as (table, fault):
            problems += [fault] if fault else []
            index = _kept(read_index(table)) if fault is None else None
    first = 0
    for entry in part.shards:
        if entry.name not in broken:
            with _read(location, entry, schema) as (table, fault):
                if fault is None and index is not None and index.disagrees(first, first + entry.rows, index_of_shard(table)):
                    fault = f"{location.name(entry.name)}: its rows disagree with the split's index"
                problems += [fault] if fault else []
        first += entry.rows
    return problems


def _kept(index: SplitIndex) -> SplitIndex:
    """A copy that does not need its file."""
    return SplitIndex(np.array(index.user_ids), index.offsets, np.array(index.first_target), index.explicit_negative_offsets)


@contextmanager
def _read(location: Location, entry: FileEntry, schema: pa.Schema) -> Iterator[tuple[pa.Table | None, str | None]]:
    """Yields (the table, None), or (None, the fault of the file)."""
    with tempfile.TemporaryDirectory(prefix="rec-dist-verify-") as folder:
        path = Path(folder) / entry.name if location.is_remote else location.folder / entry.name
        name = location.name(entry.name)
        try:
            found = location.copy(entry.name, path) if location.is_remote else sha256(path)
            if damage := entry.damage(path.stat().st_size, found):
                yield None, f"{name} {damage}"
                return
            table = read_arrow(path)
        except FileNotFoundError:
            yield None, f"{name} is missing"
            return
        except UserError as refusal:
            yield None, str(refusal).replace(str(path), name)
            return
        wrong = table_fault(table, entry, schema)
        yield (None, f"{name}: {wrong}") if wrong else (table, None)
