"""What a trained sequential recommender leaves for the methods that learn from it: item embeddings, and its best items a position.

Two Arrow files (IPC file format, uncompressed) beside the model, and teacher.json, written last, which says which model and which
data they belong to. Each is written under a temporary name and renamed. Cost: 4 D bytes an item; 12 + 4 h bytes a training target.

I items of the catalogue, D width, R training targets, h items a list.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rec_dist.data.manifest import FileEntry, describe_file, read_arrow
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.files import atomic_path, sha256, write_json
from rec_dist.stream.trunk import I32, I64

TEACHER_NAME, EMBEDDINGS_NAME, TOP_ITEMS_NAME = "teacher.json", "item_embeddings.arrow", "top_items.arrow"
_FORMAT_VERSION = 1
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TopItems:
    """Lists of some targets: user_ids (R,), positions (R,) in the user's sequence, items (R, h) best first."""

    user_ids: I64
    positions: I64
    items: I32


@dataclass(frozen=True)
class Teacher:
    """What lies in a model folder: embeddings (I, D), row i item i's; lists in ascending (user, position); read-only views."""

    embeddings: F32
    lists: TopItems


def write_teacher(
    folder: Path, embeddings: F32, lists: Iterable[TopItems], *, top_h: int, weights: Path, data_fingerprint: str
) -> None:
    """Writes both files and teacher.json into `folder`. lists: in order, each on disk before the next is asked for."""
    _write(
        folder / EMBEDDINGS_NAME,
        _embedding_schema(embeddings.shape[1]),
        [[np.arange(len(embeddings), dtype=np.int32), embeddings]],
    )
    rows = ((part.user_ids, part.positions.astype(np.int32), part.items) for part in lists)
    num_rows = _write(folder / TOP_ITEMS_NAME, _top_schema(top_h), rows)
    write_json(
        folder / TEACHER_NAME,
        {
            "format_version": _FORMAT_VERSION,
            "weights": {"name": weights.name, "sha256": sha256(weights)},
            "data_fingerprint": data_fingerprint,
            "top_h": top_h,
            "files": [
                asdict(describe_file(folder / EMBEDDINGS_NAME, len(embeddings))),
                asdict(describe_file(folder / TOP_ITEMS_NAME, num_rows)),
            ],
        },
    )


def read_teacher(folder: Path, *, data_fingerprint: str) -> Teacher:
    """Reads what write_teacher left in `folder`, checking every hash, the model's too (about 1 GB/s).

    UserError: there is nothing, it was made from other data, or it or the model beside it has changed since.
    """
    manifest = _manifest(folder)
    if manifest["data_fingerprint"] != data_fingerprint:
        raise UserError(f"the lists in {folder} were made from another data set; their item ids mean other items")
    weights = FileEntry(manifest["weights"]["name"], 0, 0, manifest["weights"]["sha256"])
    for entry in (weights, *(FileEntry(**entry) for entry in manifest["files"])):
        path = folder / entry.name
        if not path.is_file() or sha256(path) != entry.sha256:
            raise UserError(f"{path} is not what {TEACHER_NAME} says it was; train that run again")
    vectors, lists = read_arrow(folder / EMBEDDINGS_NAME), read_arrow(folder / TOP_ITEMS_NAME)
    return Teacher(
        embeddings=_matrix(vectors["vector"]),
        lists=TopItems(lists["user_id"].to_numpy(), lists["position"].to_numpy().astype(np.int64), _matrix(lists["items"])),
    )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / TEACHER_NAME
    if not path.is_file():
        raise UserError(
            f"{folder} holds no lists of a teacher ({TEACHER_NAME} is missing); train it with task.sequential.top_h above 0"
        )
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if value.get("format_version") != _FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {value.get('format_version')}, this release reads {_FORMAT_VERSION}; train it again"
        )
    return value


def _embedding_schema(width: int) -> pa.Schema:
    vector = pa.list_(pa.field("item", pa.float32(), nullable=False), width)
    return pa.schema([pa.field("item_id", pa.int32(), nullable=False), pa.field("vector", vector, nullable=False)])


def _top_schema(top_h: int) -> pa.Schema:
    items = pa.list_(pa.field("item", pa.int32(), nullable=False), top_h)
    return pa.schema(
        [
            pa.field("user_id", pa.int64(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("items", items, nullable=False),
        ]
    )


def _write(path: Path, schema: pa.Schema, parts: Iterable[Sequence[npt.NDArray[Any]]]) -> int:
    """Writes each part, columns in the schema's order, as a record batch; whole or not at all. Returns the rows."""
    num_rows = 0
    with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        for columns in parts:
            arrays = [_array(values, field.type) for values, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            num_rows += len(columns[0])
    return num_rows


def _array(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values, type=kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1), type=kind.value_type), type=kind)


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of fixed-size lists as (rows, size)."""
    size = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, size) for chunk in column.chunks]
    return np.concatenate(parts) if len(parts) != 1 else parts[0]
