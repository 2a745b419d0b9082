"""A prepared data set, opened for reading: memory-mapped, flat numpy columns, no copy unless a split lies in several shards.

Letters: U rows (users) of a split, N items over all its rows, D dislikes over all its rows, I items of the catalogue.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rec_dist.data.manifest import Manifest, read_arrow, verify
from rec_dist.data.schema import ITEM_SCHEMA, SEQUENCE_SCHEMA
from rec_dist.runtime.errors import UserError
from rec_dist.stream.trunk import I32, I64

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class SequenceSplit:
    """One split; row r's items are items[offsets[r]:offsets[r+1]], its targets those from position first_target[r] on.

    user_ids (U,) int64 ascending; offsets (U+1,) int64; items (N,) int32; first_target (U,) int32 >= 1;
    disliked_offsets (U+1,) int64; disliked (D,) int32, rated below
    data.min_rating within the training part. The arrays are read-only.
    """

    name: str
    user_ids: I64
    offsets: I64
    items: I32
    first_target: I32
    disliked_offsets: I64
    disliked: I32
    raw_user_column: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def num_targets(self) -> int:
        """Targets over all rows."""
        return int((np.diff(self.offsets) - self.first_target).sum())

    def items_of(self, row: int) -> I32:
        """The items of row `row` in time order, history and targets."""
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def disliked_of(self, row: int) -> I32:
        """What the user of row `row` disliked within the training part."""
        return self.disliked[self.disliked_offsets[row] : self.disliked_offsets[row + 1]]

    def raw_user(self, row: int) -> str:
        """The source's name of the user of row `row`."""
        return str(self.raw_user_column[row].as_py())


@dataclass(frozen=True)
class PreparedData:
    """The catalogue in memory, the splits on disk until asked for.

    titles[i], raw_items[i] and categories[i] are item i's; train_counts (I,) says how often it stands in rows of the train split.
    """

    path: Path
    manifest: Manifest
    titles: list[str]
    raw_items: list[str]
    categories: list[list[str]]
    train_counts: I64

    @staticmethod
    def open(path: str | Path, *, check_hashes: bool = False) -> "PreparedData":
        """Opens the folder `path` (data.path). check_hashes reads every file once, about 1 GB/s, and finds flipped bits.

        UserError: no prepared data set, or a file that is missing, of another size, or of another schema.
        """
        folder = Path(path).expanduser().absolute()
        manifest = Manifest.load(folder)
        if problems := verify(folder, hashes=check_hashes):
            raise UserError(
                f"data.path ({folder}) is damaged, {len(problems)} fault(s): {problems[0]}; "
                "remove the folder and run `rec-dist prepare CONFIG`."
            )
        table = _columns(folder / manifest.items.name, ITEM_SCHEMA)
        return PreparedData(
            path=folder,
            manifest=manifest,
            titles=table["title"].to_pylist(),
            raw_items=table["raw_item"].to_pylist(),
            categories=table["categories"].to_pylist(),
            train_counts=_flat(table["train_count"].chunks, np.int64),
        )

    @property
    def num_items(self) -> int:
        """I, the size of the catalogue."""
        return len(self.titles)

    def split(self, name: str) -> SequenceSplit:
        """The split "train", "valid" or "test". UserError: another name."""
        entry = self.manifest.splits.get(name)
        if entry is None:
            raise UserError(f"{name} is no split of {self.path}; splits are {', '.join(self.manifest.splits)}.")
        table = pa.concat_tables([_columns(self.path / shard.name, SEQUENCE_SCHEMA) for shard in entry.shards])
        offsets, items = _flat_lists(table["items"])
        disliked_offsets, disliked = _flat_lists(table["disliked"])
        return SequenceSplit(
            name=name,
            user_ids=_flat(table["user_id"].chunks, np.int64),
            offsets=offsets,
            items=items,
            first_target=_flat(table["first_target"].chunks, np.int32),
            disliked_offsets=disliked_offsets,
            disliked=disliked,
            raw_user_column=table["raw_user"],
        )


def _columns(path: Path, schema: pa.Schema) -> pa.Table:
    table = read_arrow(path)
    if not table.schema.equals(schema):
        raise UserError(
            f"{path} has other columns than this release writes; remove the data set and run `rec-dist prepare CONFIG`."
        )
    return table


def _flat(chunks: list[pa.Array], dtype: type[_Scalar]) -> npt.NDArray[_Scalar]:
    """Chunks without nulls as one array: a view of the mapped file if there is one chunk with rows."""
    filled: list[npt.NDArray[_Scalar]] = [chunk.to_numpy(zero_copy_only=True) for chunk in chunks if len(chunk)]
    if len(filled) == 1:
        return filled[0]
    out = np.concatenate(filled) if filled else np.zeros(0, dtype=dtype)
    out.flags.writeable = False
    return out


def _flat_lists(column: pa.ChunkedArray) -> tuple[I64, I32]:
    """A list<int32> column as (offsets (rows+1,) int64, values)."""
    lengths = [np.diff(chunk.offsets.to_numpy(zero_copy_only=True)) for chunk in column.chunks if len(chunk)]
    offsets: I64 = np.zeros(len(column) + 1, dtype=np.int64)
    if lengths:
        np.cumsum(np.concatenate(lengths), out=offsets[1:])
    offsets.flags.writeable = False
    return offsets, _flat([chunk.flatten() for chunk in column.chunks], np.int32)
