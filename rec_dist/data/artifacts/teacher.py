"""What a trained sequential recommender writes for methods that learn from it: item embeddings, and its best items per position.

These are two Arrow files (IPC file format, uncompressed) beside the model. teacher.json is written last and says which model
and data they belong to. Each file is written under a temporary name and renamed. Cost: 4 D bytes per item; 12 + 4 h bytes per
training target.

I items of the catalogue, D width, R training targets, h items per list.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.data.artifacts.matrices import F32, matrix, vector_schema, write_columns
from rec_dist.data.dataset.manifest import read_arrow
from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.checksums import damage, describe, read_manifest, write_manifest

TEACHER_NAME, EMBEDDINGS_NAME, TOP_ITEMS_NAME = "teacher.json", "item_embeddings.arrow", "top_items.arrow"
_FORMAT_VERSION = 2


@dataclass(frozen=True)
class TopItems:
    """Lists of R targets: user_ids (R,), positions (R,) in the user's sequence, items (R, h) with the best first."""

    user_ids: I64
    positions: I64
    items: I32


@dataclass(frozen=True)
class Teacher:
    """Read-only views of a teacher's files: embeddings (I, D), row i for item i; lists in ascending order of (user, position)."""

    embeddings: F32
    lists: TopItems


def write_teacher(
    folder: Path, embeddings: F32, lists: Iterable[TopItems], *, top_h: int, weights: Path, data_fingerprint: str
) -> None:
    """Writes both files and teacher.json into `folder`. Takes `lists` in order, and writes each before it asks for the next."""
    write_columns(
        folder / EMBEDDINGS_NAME,
        vector_schema(embeddings.shape[1]),
        [[np.arange(len(embeddings), dtype=np.int32), embeddings]],
    )
    rows = ((part.user_ids, part.positions.astype(np.int32), part.items) for part in lists)
    num_rows = write_columns(folder / TOP_ITEMS_NAME, top_schema(top_h), rows)
    files = [describe(weights), describe(folder / EMBEDDINGS_NAME, len(embeddings)), describe(folder / TOP_ITEMS_NAME, num_rows)]
    facts = {"data_fingerprint": data_fingerprint, "top_h": top_h, "files": [asdict(entry) for entry in files]}
    write_manifest(folder / TEACHER_NAME, _FORMAT_VERSION, facts)


def read_teacher(folder: Path, *, data_fingerprint: str) -> Teacher:
    """Reads what write_teacher wrote into `folder`, and checks the hash of every file, also of the model (about 1 GB/s).

    Raises UserError if there is no teacher, if it was made from other data, or if a file has changed since.
    """
    path = folder / TEACHER_NAME
    if not path.is_file():
        raise UserError(
            f"{folder} holds no lists of a teacher ({TEACHER_NAME} is missing); train it with task.sequential.top_h above 0"
        )
    manifest, files = read_manifest(path, _FORMAT_VERSION, TRAIN_AGAIN)
    if manifest.get("data_fingerprint") != data_fingerprint:
        raise UserError(
            f"the teacher in {folder} was trained on another data set, whose item ids mean other items; train one on data.path"
        )
    if problems := damage(folder, files):
        raise UserError(f"{folder}: {problems[0]}; {TRAIN_AGAIN}")
    vectors, lists = read_arrow(folder / EMBEDDINGS_NAME), read_arrow(folder / TOP_ITEMS_NAME)
    return Teacher(
        embeddings=matrix(vectors["vector"]),
        lists=TopItems(lists["user_id"].to_numpy(), lists["position"].to_numpy().astype(np.int64), matrix(lists["items"])),
    )


def top_schema(top_h: int) -> pa.Schema:
    """user_id int64, position int32, items int32[top_h]: the schema of TopItems."""
    items = pa.list_(pa.field("item", pa.int32(), nullable=False), top_h)
    return pa.schema(
        [
            pa.field("user_id", pa.int64(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("items", items, nullable=False),
        ]
    )
