"""Prepared data sets for tests: real files, in any number of shards, of rows that a test chooses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.dataset.schema import SPLITS
from rec_dist.data.prepare.shards import Sequences, write_items, write_split
from rec_dist.data.prepare.splits import Cut
from rec_dist.data.sources.interactions import ItemTable


@dataclass(frozen=True)
class Row:
    """One user's row of a split."""

    user: int
    items: Sequence[int]
    first_target: int = 1
    explicit_negatives: Sequence[int] = field(default_factory=tuple)


def write_prepared(
    folder: Path, rows: dict[str, list[Row]], titles: Sequence[str], *, num_shards: int = 2, cache: Path | None = None
) -> PreparedData:
    """Writes the data set into `folder` and opens it.

    rows: the rows of each split, in ascending user order. A split that is left out is empty.
    """
    folder.mkdir(parents=True)
    counts = np.bincount(
        np.asarray([item for row in rows.get("train", []) for item in row.items], dtype=np.int64), minlength=len(titles)
    )
    table = ItemTable(
        [f"i{item}" for item in range(len(titles))], list(titles), [None] * len(titles), [[] for _ in range(len(titles))]
    )
    entries = {}
    for split in SPLITS:
        chosen = rows.get(split, [])
        cut = Cut(
            np.asarray([row.user for row in chosen], dtype=np.int64),
            np.asarray([len(row.items) for row in chosen], dtype=np.int64),
            np.asarray([row.first_target for row in chosen], dtype=np.int64),
        )
        entries[split] = write_split(folder, split, cut, _sequences(chosen), num_shards)
    Manifest(
        fingerprint="of-a-test",
        source="rows",
        settings={},
        sources=[],
        cuts={},
        counts={"items": len(titles)},
        bad_rows={},
        tie_share=0.0,
        notes=[],
        items=write_items(folder, table, counts),
        splits=entries,
    ).save(folder)
    return PreparedData.open(folder, cache=str(cache or folder.with_name(folder.name + "-cache")))


def _sequences(rows: list[Row]) -> Sequences:
    """The lengths of all users up to the last. Users without a row have nothing."""
    num_users = max((row.user for row in rows), default=-1) + 1
    lengths, explicit_negatives = np.zeros(num_users, dtype=np.int64), np.zeros(num_users, dtype=np.int64)
    for row in rows:
        lengths[row.user], explicit_negatives[row.user] = len(row.items), len(row.explicit_negatives)
    items = np.asarray([item for row in rows for item in row.items], dtype=np.int64)
    return Sequences(
        raw_users=pa.array([f"u{user}" for user in range(num_users)], pa.string()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item=items,
        timestamp=np.arange(len(items), dtype=np.int64),
        rating=None,
        explicit_negative_offsets=np.concatenate([[0], np.cumsum(explicit_negatives)]).astype(np.int64),
        explicit_negatives=np.asarray([item for row in rows for item in row.explicit_negatives], dtype=np.int64),
    )
