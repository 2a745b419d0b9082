"""What a trained sequential recommender leaves for the methods that learn from it: item embeddings, and its best items a position.

Two Arrow files (IPC file format, uncompressed) beside the model, and teacher.json, written last, which says which model and which
data they belong to. Each is written under a temporary name and renamed. Cost: 4 D bytes an item; 12 + 4 h bytes a training target.

I items of the catalogue, D width, R training targets, h items a list.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.data.artifacts.matrices import F32, matrix, vector_schema, write_columns
from rec_dist.data.dataset.manifest import FileEntry, changed_file, describe_file, read_arrow
from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.files import read_object, sha256, write_json

TEACHER_NAME, EMBEDDINGS_NAME, TOP_ITEMS_NAME = "teacher.json", "item_embeddings.arrow", "top_items.arrow"
_FORMAT_VERSION = 1


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
    write_columns(
        folder / EMBEDDINGS_NAME,
        vector_schema(embeddings.shape[1]),
        [[np.arange(len(embeddings), dtype=np.int32), embeddings]],
    )
    rows = ((part.user_ids, part.positions.astype(np.int32), part.items) for part in lists)
    num_rows = write_columns(folder / TOP_ITEMS_NAME, _top_schema(top_h), rows)
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
    made_from, files = _manifest(folder)
    if made_from != data_fingerprint:
        raise UserError(
            f"the teacher in {folder} was trained on another data set, whose item ids mean other items; train one on data.path"
        )
    if path := changed_file(folder, files):
        raise UserError(f"{path} is not what {TEACHER_NAME} says it was; {TRAIN_AGAIN}")
    vectors, lists = read_arrow(folder / EMBEDDINGS_NAME), read_arrow(folder / TOP_ITEMS_NAME)
    return Teacher(
        embeddings=matrix(vectors["vector"]),
        lists=TopItems(lists["user_id"].to_numpy(), lists["position"].to_numpy().astype(np.int64), matrix(lists["items"])),
    )


def _manifest(folder: Path) -> tuple[str, list[FileEntry]]:
    """The fingerprint of the teacher's data, and its files."""
    path = folder / TEACHER_NAME
    if not path.is_file():
        raise UserError(
            f"{folder} holds no lists of a teacher ({TEACHER_NAME} is missing); train it with task.sequential.top_h above 0"
        )
    value = read_object(path, TRAIN_AGAIN)
    if value.get("format_version") != _FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {value.get('format_version')}, this release reads {_FORMAT_VERSION}; train it again"
        )
    try:
        weights = FileEntry(value["weights"]["name"], 0, 0, value["weights"]["sha256"])
        return value["data_fingerprint"], [weights, *(FileEntry(**entry) for entry in value["files"])]
    except (KeyError, TypeError) as fault:
        raise UserError(f"{path} has other fields than were written ({fault}); {TRAIN_AGAIN}") from fault


def _top_schema(top_h: int) -> pa.Schema:
    items = pa.list_(pa.field("item", pa.int32(), nullable=False), top_h)
    return pa.schema(
        [
            pa.field("user_id", pa.int64(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("items", items, nullable=False),
        ]
    )
