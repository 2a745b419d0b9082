"""What a teacher of any kind leaves for a student: its best items, with their scores, after the history before training targets.

One Arrow file (IPC file format, uncompressed), which every rank maps, and teacher.json, written last: data, inputs, size and hash.
Cost: 12 + 8 h bytes a target.

R training targets, h items of a list.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rec_dist.data.artifacts.matrices import F32, matrix, record_batch
from rec_dist.data.artifacts.recommendations import RecordBatch
from rec_dist.data.artifacts.teacher import TEACHER_NAME, TopItems, top_schema
from rec_dist.data.dataset.manifest import read_arrow
from rec_dist.errors import UserError
from rec_dist.storage.checksums import damage, describe, read_manifest, write_manifest
from rec_dist.storage.files import json_text

LISTS_NAME = "scored_lists.arrow"
_FORMAT_VERSION = 2
_AGAIN = "remove that folder and run `rec-dist distil` again"


@dataclass(frozen=True)
class ScoredLists:
    """Lists of R training targets in ascending order of (user, position), with their scores (R, h).

    A list that is shorter than h ends with the item -1, whose score means nothing.
    """

    lists: TopItems
    scores: F32


def list_batch(lists: TopItems, scores: F32) -> RecordBatch:
    """Some of the rows of the file, in their order."""
    columns = (lists.user_ids, lists.positions.astype(np.int32), lists.items, scores)
    of_items = top_schema(lists.items.shape[1])
    kind = pa.list_(pa.field("item", pa.float32(), nullable=False), lists.items.shape[1])
    return record_batch(pa.schema([*of_items, pa.field("scores", kind, nullable=False)]), columns)


def finish_lists(folder: Path, *, rows: int, data_fingerprint: str, inputs: dict[str, Any]) -> None:
    """Writes teacher.json beside the whole file. inputs: all that the lists depend on."""
    file = asdict(describe(folder / LISTS_NAME, rows))
    write_manifest(
        folder / TEACHER_NAME, _FORMAT_VERSION, {"data_fingerprint": data_fingerprint, "inputs": inputs, "files": [file]}
    )


def finished_lists(folder: Path, *, inputs: dict[str, Any]) -> bool:
    """Whether the folder holds the lists of these inputs. Raises UserError if it holds those of others."""
    if not (folder / TEACHER_NAME).is_file():
        return False
    there = read_manifest(folder / TEACHER_NAME, _FORMAT_VERSION, _AGAIN)[0].get("inputs")
    old = there if isinstance(there, dict) else {}
    if changed := sorted(key for key in old.keys() | inputs.keys() if json_text(old.get(key)) != json_text(inputs.get(key))):
        raise UserError(
            f"{folder} holds the lists of another teacher (different: {', '.join(changed)}); remove that folder, or name another "
            "in task.sequential.distil.lists"
        )
    return True


def check_lists(folder: Path) -> None:
    """Raises UserError if the folder holds no finished lists."""
    if not (folder / TEACHER_NAME).is_file() or not (folder / LISTS_NAME).is_file():
        raise UserError(
            f"task.sequential.distil.lists ({folder}) holds no lists of a teacher ({TEACHER_NAME} and {LISTS_NAME}); make them with "
            "`rec-dist distil RUN_DIR --into CONFIG`"
        )


def read_lists(folder: Path, *, data_fingerprint: str) -> ScoredLists:
    """The lists in `folder`, as views, after a check of the file's hash (about 1 GB/s).

    Raises UserError if there are none, if they were made on other data, or if the file has changed since.
    """
    check_lists(folder)
    manifest, files = read_manifest(folder / TEACHER_NAME, _FORMAT_VERSION, _AGAIN)
    if manifest.get("data_fingerprint") != data_fingerprint:
        raise UserError(f"the lists in {folder} are of another data set, whose item ids mean other items; make them on data.path")
    if problems := damage(folder, files):
        raise UserError(f"{folder}: {problems[0]}; {_AGAIN}")
    table = read_arrow(folder / LISTS_NAME)
    lists = TopItems(table["user_id"].to_numpy(), table["position"].to_numpy().astype(np.int64), matrix(table["items"]))
    return ScoredLists(lists, matrix(table["scores"]))
