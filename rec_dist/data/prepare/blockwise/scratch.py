"""Intermediate files: numpy columns in Arrow files with one record batch per part, memory-mapped when they are read.

Every process that runs a job must see the folder, so on a cluster data.path must be on a shared file system.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, np.dtype[Any]]


def to_arrow(values: Array | pa.Array) -> pa.Array:
    """Converts a numpy column without a copy; booleans become bytes."""
    if not isinstance(values, np.ndarray):
        return values
    return pa.array(values.view(np.uint8) if values.dtype == np.bool_ else values)


def write_batches(path: Path, batches: Iterable[dict[str, Any]]) -> None:
    """Writes the columns of each part, which all have the same names and types.

    The file appears whole or not at all, so that a job can be run again.
    """
    temporary = path.with_suffix(".tmp")
    writer = None
    with pa.OSFile(str(temporary), "wb") as sink:
        for columns in batches:
            batch = pa.RecordBatch.from_pydict({name: to_arrow(values) for name, values in columns.items()})
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
        assert writer is not None, "there is at least one part"
        writer.close()
    temporary.replace(path)


def read_batch(path: Path, index: int = 0) -> pa.RecordBatch:
    """Reads one part; its columns are views of the mapped file."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(index)


def column(batch: pa.RecordBatch, name: str) -> Array:
    """One numeric column as numpy, read-only and without a copy."""
    values: Array = batch.column(name).to_numpy(zero_copy_only=True)
    return values


def save_array(path: Path, values: Array) -> None:
    """Writes an array for load_array."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, values)
    temporary.replace(path)


def load_array(path: Path) -> Array:
    """Memory-maps an array that save_array wrote."""
    values: Array = np.load(path, mmap_mode="r")
    return values
