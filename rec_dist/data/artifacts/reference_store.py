"""Reference log-probs on disk: one Arrow part per rank, keyed by target and draw, and a manifest that says what they belong to.

A changed model, prompt or negative changes the key in the manifest. The store is then computed again and never reused.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I64
from rec_dist.storage.checksums import damage, describe, read_manifest, write_manifest
from rec_dist.storage.files import atomic_path, fresh_folder

MANIFEST_NAME = "manifest.json"
_FORMAT_VERSION = 1
_AGAIN = "remove that folder and run the same command again"
F32 = npt.NDArray[np.float32]
_SCHEMA = pa.schema([pa.field("key", pa.int64(), nullable=False), pa.field("logps", pa.list_(pa.float32()), nullable=False)])


class ReferenceStore:
    """The log-probs of G groups by their keys (G,); group g has logps[offsets[g] : offsets[g + 1]]."""

    def __init__(self, keys: I64, offsets: I64, logps: F32) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys, self._starts, self._lengths, self._logps = keys[order], offsets[:-1][order], np.diff(offsets)[order], logps

    def __len__(self) -> int:
        return len(self._keys)

    def lookup(self, keys: I64) -> F32:
        """The log-probs of the groups `keys`, one after another. Every key must be in the store."""
        at = np.searchsorted(self._keys, keys)
        assert (at < len(self._keys)).all() and (self._keys[at] == keys).all(), "a group has no reference log-probs"
        starts, lengths = self._starts[at], self._lengths[at]
        before = np.concatenate([[0], np.cumsum(lengths)])
        index = np.repeat(starts - before[:-1], lengths) + np.arange(int(before[-1]))
        return self._logps[index]


def write_part(folder: Path, rank: int, keys: I64, offsets: I64, logps: F32) -> None:
    """Writes the groups of one rank, whole or not at all."""
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(logps.astype(np.float32)))
    table = pa.table([pa.array(keys), lists], schema=_SCHEMA)
    with atomic_path(folder / f"part-{rank:05d}.arrow") as temporary, pa.ipc.new_file(str(temporary), _SCHEMA) as writer:
        writer.write_table(table)


def commit(folder: Path, key: str, num_parts: int) -> None:
    """Writes the manifest, which makes the store valid."""
    files = [asdict(describe(folder / f"part-{rank:05d}.arrow")) for rank in range(num_parts)]
    write_manifest(folder / MANIFEST_NAME, _FORMAT_VERSION, {"key": key, "files": files})


def is_current(folder: Path, key: str) -> bool:
    """Whether the store in `folder` is whole and belongs to `key`."""
    try:
        manifest, files = read_manifest(folder / MANIFEST_NAME, _FORMAT_VERSION, _AGAIN)
    except UserError:
        return False
    return manifest.get("key") == key and not damage(folder, files)


def clear(folder: Path) -> None:
    """Empties the folder for a new store. What it held was of another key, and no run that this directory belongs to reads it."""
    fresh_folder(folder)


def load(folder: Path) -> ReferenceStore:
    """Reads all parts of a committed store."""
    tables = []
    for entry in read_manifest(folder / MANIFEST_NAME, _FORMAT_VERSION, _AGAIN)[1]:
        with pa.memory_map(str(folder / entry.name)) as source:
            tables.append(pa.ipc.open_file(source).read_all())
    table = pa.concat_tables(tables).combine_chunks()
    keys = table.column("key").to_numpy()
    lists = table.column("logps")
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in lists.chunks] or [np.empty(0, dtype=np.int64)])
    flat = [chunk.flatten().to_numpy() for chunk in lists.chunks] or [np.empty(0, dtype=np.float32)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return ReferenceStore(keys, offsets, np.concatenate(flat))
