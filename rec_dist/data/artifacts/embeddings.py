"""Item embeddings as `rec-dist embed` writes them: one vector per item of the catalogue, and what they were made from.

embeddings.arrow (item_id, vector) and embeddings.safetensors (the tensor `embeddings`) hold the same float32 values.
embeddings.json is written last and ties both to data, model, adapter and prompt. Until then, parts/ holds the finished parts: a
file per run of items, renamed into place, with a key of all inputs. Cost: 8 D bytes per item; writing holds one part in memory.

I items, D width, n items of a part.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rec_dist.data.artifacts.matrices import F32, matrices, vector_schema, write_columns
from rec_dist.data.dataset.manifest import read_arrow
from rec_dist.errors import UserError
from rec_dist.storage import checksums
from rec_dist.storage.checksums import damage, describe, parse_entry, write_manifest
from rec_dist.storage.files import atomic_path

EMBEDDED_NAME, ARROW_NAME, TENSOR_NAME, PARTS_NAME = "embeddings.json", "embeddings.arrow", "embeddings.safetensors", "parts"
_KEY = "embeddings"
_FORMAT_VERSION = 2
_AGAIN = "remove that folder and run `rec-dist embed` again"


@dataclass(frozen=True)
class PartFiles:
    """The parts of one catalogue: part p has items starts[p] .. starts[p + 1] - 1.

    key: changes with everything that a vector depends on.
    """

    folder: Path
    key: str
    starts: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def size(self, part: int) -> int:
        """n, the items of part `part`."""
        return self.starts[part + 1] - self.starts[part]

    def path(self, part: int) -> Path:
        """The file of part `part`."""
        return self.folder / PARTS_NAME / f"part-{part:06d}.safetensors"

    def write(self, part: int, vectors: F32) -> None:
        """Writes vectors (n, D), whole or not at all."""
        assert len(vectors) == self.size(part)
        with atomic_path(self.path(part)) as temporary:
            vectors = np.ascontiguousarray(vectors, dtype=np.float32)
            save_file({_KEY: vectors}, temporary, metadata={"key": self.key, "sha256": _digest(vectors)})

    def is_current(self, part: int) -> bool:
        """Whether the part exists, was made from these inputs, and is undamaged."""
        try:
            with safe_open(self.path(part), framework="np") as file:
                facts, vectors = file.metadata() or {}, file.get_tensor(_KEY)
        except (OSError, SafetensorError):
            return False
        return (facts.get("key"), facts.get("sha256"), len(vectors)) == (self.key, _digest(vectors), self.size(part))

    def read(self, part: int) -> F32:
        """The vectors (n, D) of part `part`."""
        with safe_open(self.path(part), framework="np") as file:
            vectors: F32 = file.get_tensor(_KEY)
            return vectors

    def join(self, facts: Mapping[str, Any]) -> None:
        """Joins all parts into the two files, writes embeddings.json with `facts`, and removes the parts."""
        width = self.read(0).shape[1]
        numbered = ([np.arange(*self.starts[part : part + 2], dtype=np.int32), self.read(part)] for part in range(len(self)))
        num_items = write_columns(self.folder / ARROW_NAME, vector_schema(width), numbered)
        _write_tensor(self.folder / TENSOR_NAME, (num_items, width), (self.read(part) for part in range(len(self))))
        files = [asdict(describe(self.folder / name, num_items)) for name in (ARROW_NAME, TENSOR_NAME)]
        value = {"num_items": num_items, "width": width, **facts, "files": files}
        write_manifest(self.folder / EMBEDDED_NAME, _FORMAT_VERSION, value)
        sweep(self.folder, ())


def sweep(folder: Path, others: Sequence[str]) -> None:
    """Removes what finished embeddings do not need: parts, temporary files of a killed process, and the files `others`."""
    shutil.rmtree(folder / PARTS_NAME, ignore_errors=True)
    for path in (*folder.glob(".embeddings.*.tmp"), *(folder / name for name in others)):
        path.unlink(missing_ok=True)


def _digest(vectors: F32) -> str:
    return hashlib.sha256(vectors.tobytes()).hexdigest()


def _write_tensor(path: Path, shape: tuple[int, int], parts: Iterator[F32]) -> None:
    """Writes one tensor as a safetensors file, part by part: the length of the header, the header, the values."""
    place = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
    header = json.dumps({"__metadata__": {"format": "np"}, _KEY: place}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as sink:
        sink.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            sink.write(np.ascontiguousarray(part, dtype="<f4").tobytes())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Reads embeddings.json; None if no embeddings are finished. Raises UserError if it is damaged or has another version."""
    path = folder / EMBEDDED_NAME
    if not path.is_file():
        return None
    value, _ = checksums.read_manifest(path, _FORMAT_VERSION, _AGAIN)
    try:
        value["inputs"]["data"], value["num_items"], value["width"]
    except (KeyError, TypeError) as fault:
        raise UserError(f"{path} has other fields than were written ({fault}); {_AGAIN}") from fault
    return value


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError if a file differs from the manifest (about 1 GB/s)."""
    if problems := damage(folder, map(parse_entry, manifest["files"])):
        raise UserError(f"{folder}: {problems[0]}; {_AGAIN}")


def read_embeddings(folder: Path, *, data_fingerprint: str) -> list[F32]:
    """The vectors in the order of the items, as blocks (n, D) that are views of the mapped file.

    Raises UserError if there are no finished embeddings, if they are damaged, or if they were made from another data set.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds no item embeddings ({EMBEDDED_NAME} is missing); make them with `rec-dist embed`")
    if manifest["inputs"]["data"] != data_fingerprint:
        raise UserError(f"the embeddings in {folder} were made from another data set, whose item ids mean other items; {_AGAIN}")
    check_files(folder, manifest)
    return matrices(read_arrow(folder / ARROW_NAME)["vector"])


def holds_other_files(folder: Path, own: Sequence[str]) -> bool:
    """Whether `folder` holds anything except unfinished or finished embeddings and the files `own`."""
    known = {EMBEDDED_NAME, ARROW_NAME, TENSOR_NAME, PARTS_NAME, *own}
    return folder.is_dir() and any(name not in known and not name.startswith(".") for name in os.listdir(folder))
