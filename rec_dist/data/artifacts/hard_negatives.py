"""Hard negatives: for each training target, items that a finished run ranks high there (negatives.kind=model). One Arrow file.

Every rank maps it. Cost: 12 + 4 W bytes a target.

R training targets, W items of a list.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rec_dist.data.artifacts.matrices import matrix, write_columns
from rec_dist.data.artifacts.teacher import TopItems, top_schema
from rec_dist.data.dataset.manifest import read_arrow
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32

HARD_NEGATIVES_NAME = "negatives.arrow"
_KEY = b"key"


@dataclass(frozen=True)
class HardNegatives:
    """Lists of R targets in ascending order of (user, position); items (R, W) end with -1 where fewer were found."""

    lists: TopItems

    def of(self, user: int, position: int) -> I32:
        """The items for one target (w,), w <= W, from the highest rank on."""
        first = int(np.searchsorted(self.lists.user_ids, user))
        place = first + position - int(self.lists.positions[first])
        assert self.lists.user_ids[place] == user and self.lists.positions[place] == position, "a target without a list"
        items: I32 = self.lists.items[place]
        found: I32 = items[items >= 0]
        return found


def write_hard_negatives(folder: Path, parts: Iterable[TopItems], *, width: int, key: str) -> None:
    """Writes the lists into `folder`. Takes `parts` in order, and writes each before it asks for the next. key: of all inputs."""
    rows = ((part.user_ids, part.positions.astype(np.int32), part.items) for part in parts)
    write_columns(folder / HARD_NEGATIVES_NAME, top_schema(width).with_metadata({_KEY: key.encode()}), rows)


def read_hard_negatives(folder: Path, *, key: str) -> HardNegatives | None:
    """The lists that write_hard_negatives() wrote under this key; None if none are there. Raises UserError for those of others."""
    path = folder / HARD_NEGATIVES_NAME
    if not path.is_file():
        return None
    table = read_arrow(path)
    if (table.schema.metadata or {}).get(_KEY) != key.encode():
        raise UserError(f"{path} was made from other data, keys or weights; remove that folder or choose another train.run_dir")
    return HardNegatives(
        TopItems(table["user_id"].to_numpy(), table["position"].to_numpy().astype(np.int64), matrix(table["items"]))
    )
