"""predictions.arrow: one row per evaluated target, with every candidate and its score. Comparing runs reads only this file.

It is written block by block, and read through a memory map: 56 bytes a row are in memory, candidates and scores only when asked.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rec_dist.data.dataset.manifest import read_arrow
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.files import atomic_path

PREDICTIONS_NAME = "predictions.arrow"
_LIMIT = b"rank_limit"
_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("target", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("history_length", pa.int32(), nullable=False),
        pa.field("train_count", pa.int64(), nullable=False),
        pa.field("candidates", pa.list_(pa.int32()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Predictions:
    """N questions; rank 1 is best. candidates[n], which include the target, are parallel to scores[n].

    A user may have several questions; positions keep them apart. With evaluate.questions, users are numbered in the order of
    their first question, and a position is the number of the question. All else is in ascending (user, position) order.
    history_lengths (N,): items before the target. train_counts (N,): how often the target occurs in the train split.
    rank_limit: ranks are exact up to it, and all others are rank_limit + 1; then scores[n] is empty. None: every rank is exact.
    """

    user_ids: I64
    positions: I32
    targets: I32
    ranks: I32
    history_lengths: I32
    train_counts: I64
    candidates: Sequence[I32]
    scores: Sequence[npt.NDArray[np.float32]]
    rank_limit: int | None = None

    def write(self, path: Path) -> None:
        """Writes all rows to `path`, whole or not at all."""
        with writing_predictions(path, rank_limit=self.rank_limit) as add:
            add(self)

    def _batch(self) -> pa.RecordBatch:
        return pa.record_batch(
            [
                pa.array(self.user_ids),
                *(
                    pa.array(column.astype(np.int32))
                    for column in (self.positions, self.targets, self.ranks, self.history_lengths)
                ),
                pa.array(self.train_counts.astype(np.int64)),
                pa.array(self.candidates, type=pa.list_(pa.int32())),
                pa.array([score.astype(np.float32) for score in self.scores], type=pa.list_(pa.float32())),
            ],
            schema=_SCHEMA,
        )

    @staticmethod
    def read(path: Path) -> "Predictions":
        """Reads `path`. Raises UserError if it does not exist."""
        if not path.is_file():
            raise UserError(f"{path} does not exist; run `rec-dist evaluate` on that run first")
        table = read_arrow(path)
        limit = (table.schema.metadata or {}).get(_LIMIT)
        if table.schema != _SCHEMA:
            raise UserError(f"{path} has other columns than this release writes; run `rec-dist evaluate` on that run again")
        return Predictions(
            user_ids=table["user_id"].to_numpy(),
            positions=table["position"].to_numpy(),
            targets=table["target"].to_numpy(),
            ranks=table["rank"].to_numpy(),
            history_lengths=table["history_length"].to_numpy(),
            train_counts=table["train_count"].to_numpy(),
            candidates=_Lists(table["candidates"].chunks, np.int32),
            scores=_Lists(table["scores"].chunks, np.float32),
            rank_limit=None if limit is None else int(limit),
        )


@contextmanager
def writing_predictions(path: Path, *, rank_limit: int | None = None) -> Iterator[Callable[[Predictions], None]]:
    """Gives a function that takes the rows block by block, in order. `path` is whole or absent. rank_limit: that of every block."""
    schema = _SCHEMA if rank_limit is None else _SCHEMA.with_metadata({_LIMIT: str(rank_limit)})
    with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:

        def add(block: Predictions) -> None:
            assert block.rank_limit == rank_limit
            writer.write_batch(block._batch().replace_schema_metadata(schema.metadata))

        yield add


class _Lists(Sequence[Any]):
    """A column of lists in several chunks, as views of the mapped file that are made when they are asked for."""

    def __init__(self, chunks: Sequence[pa.ListArray], dtype: type[np.generic]) -> None:
        self._parts = [(chunk.offsets.to_numpy(), _values(chunk.values, dtype)) for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([len(offsets) - 1 for offsets, _ in self._parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: Any) -> Any:
        """The list of one row, without a copy."""
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        part = bisect_right(self._ends, row)
        offsets, values = self._parts[part]
        row -= self._ends[part - 1] if part else 0
        return values[offsets[row] : offsets[row + 1]]


def _values(array: pa.Array, dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.frombuffer(array.buffers()[1], dtype=dtype, count=len(array), offset=array.offset * np.dtype(dtype).itemsize)
