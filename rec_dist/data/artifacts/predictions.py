"""predictions.arrow: one row per evaluated target, with every candidate and its score. Comparing runs reads only this file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rec_dist.data.dataset.manifest import read_arrow
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.files import atomic_path

PREDICTIONS_NAME = "predictions.arrow"
_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("target", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("candidates", pa.list_(pa.int32()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Predictions:
    """N questions; rank 1 is best. candidates[n], which include the target, are parallel to scores[n].

    A user may have several questions; positions keep them apart. With evaluate.questions, users are numbered in the order of
    their first question, and a position is the number of the question. All else is in ascending (user, position) order.
    """

    user_ids: I64
    positions: I32
    targets: I32
    ranks: I32
    candidates: list[I32]
    scores: list[npt.NDArray[np.float32]]

    def write(self, path: Path) -> None:
        """Writes all rows to `path`, whole or not at all."""
        table = pa.table(
            [
                self.user_ids,
                self.positions.astype(np.int32),
                self.targets.astype(np.int32),
                self.ranks.astype(np.int32),
                pa.array(self.candidates, type=pa.list_(pa.int32())),
                pa.array([score.astype(np.float32) for score in self.scores], type=pa.list_(pa.float32())),
            ],
            schema=_SCHEMA,
        )
        with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), _SCHEMA) as writer:
            writer.write_table(table)

    @staticmethod
    def read(path: Path) -> "Predictions":
        """Reads `path`. Raises UserError if it does not exist."""
        if not path.is_file():
            raise UserError(f"{path} does not exist; run `rec-dist evaluate` on that run first")
        table = read_arrow(path)
        column = {name: table[name].combine_chunks() for name in _SCHEMA.names}
        return Predictions(
            user_ids=column["user_id"].to_numpy(),
            positions=column["position"].to_numpy(),
            targets=column["target"].to_numpy(),
            ranks=column["rank"].to_numpy(),
            candidates=[row.values.to_numpy() for row in column["candidates"]],
            scores=[row.values.to_numpy() for row in column["scores"]],
        )
