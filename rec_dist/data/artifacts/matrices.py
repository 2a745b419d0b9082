"""Matrices in Arrow files: one column of fixed-size lists per matrix, written part by part and read as views.

The files use the IPC file format without compression, so a float32 takes 4 bytes, and reading maps the file.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rec_dist.storage.files import atomic_path

F32 = npt.NDArray[np.float32]


def vector_schema(width: int) -> pa.Schema:
    """item_id int32, vector float32[width]."""
    vector = pa.list_(pa.field("item", pa.float32(), nullable=False), width)
    return pa.schema([pa.field("item_id", pa.int32(), nullable=False), pa.field("vector", vector, nullable=False)])


def write_columns(path: Path, schema: pa.Schema, parts: Iterable[Sequence[npt.NDArray[Any]]]) -> int:
    """Writes each part, with columns in the order of the schema, as a record batch. Writes the file whole or not at all.

    Returns the number of rows.
    """
    num_rows = 0
    with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        for columns in parts:
            writer.write_batch(record_batch(schema, columns))
            num_rows += len(columns[0])
    return num_rows


def record_batch(schema: pa.Schema, columns: Sequence[npt.NDArray[Any]]) -> pa.RecordBatch:
    """Columns in the order of the schema, (N,) or (N, size) each, as one record batch."""
    return pa.record_batch([_array(values, field.type) for values, field in zip(columns, schema, strict=True)], schema=schema)


def _array(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values, type=kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1), type=kind.value_type), type=kind)


def matrices(column: pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    """A column of fixed-size lists as views (rows, size), one per record batch."""
    size = column.type.list_size
    return [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, size) for chunk in column.chunks]


def matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of fixed-size lists as one array (rows, size); a view if there is only one record batch."""
    parts = matrices(column)
    return np.concatenate(parts) if len(parts) != 1 else parts[0]
