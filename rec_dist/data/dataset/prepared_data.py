"""A prepared data set, opened for reading: the catalogue and the index of a split are in memory, shards are mapped when needed.

Letters: U rows (users) of a split, N items over all its rows, I items of the catalogue.
"""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.index import flat, read_index
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.node_cache import NodeCache
from rec_dist.data.dataset.reading import Shards, Source
from rec_dist.data.dataset.schema import INDEX_SCHEMA, ITEM_SCHEMA, PREPARE_AGAIN
from rec_dist.data.dataset.verify import folder_faults
from rec_dist.errors import UserError
from rec_dist.runtime.arrays import F32, I32, I64
from rec_dist.runtime.packages import cache_dir
from rec_dist.storage.location import Location
from rec_dist.storage.uri import local_path

CACHE_BYTES = 64 << 30  # data.cache_bytes if there is no configuration


@dataclass(frozen=True)
class SequenceSplit:
    """One split. Row r has offsets[r + 1] - offsets[r] items, and those from position first_target[r] on are its targets.

    user_ids (U,) int64 ascending; offsets, explicit_negative_offsets (U+1,) int64; first_target (U,) int32 >= 1. All are
    read-only.
    """

    name: str
    user_ids: I64
    offsets: I64
    first_target: I32
    explicit_negative_offsets: I64
    shards: Shards

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def num_targets(self) -> int:
        """The targets of all rows."""
        return int((np.diff(self.offsets) - self.first_target).sum())

    @property
    def num_items(self) -> int:
        """N, the items of all rows."""
        return int(self.offsets[-1])

    def take(self, rows: I64, counts: I64) -> I32:
        """The first counts (R,) items of rows (R,), one row after another."""
        return self.shards.items(rows, counts)

    def items_of(self, row: int) -> I32:
        """All items of row `row` in time order: history and targets."""
        return self.shards.items_of(row)

    def ratings_of(self, row: int) -> F32 | None:
        """The ratings of the items of row `row`, None if the source has no ratings."""
        return self.shards.ratings_of(row)

    def timestamps_of(self, row: int) -> I64:
        """The timestamps of the items of row `row`, in the unit of the source, ascending."""
        return self.shards.timestamps_of(row)

    def explicit_negatives_of(self, row: int) -> I32:
        """The explicit negatives of row `row`: items that its user rated below data.min_rating within the training part."""
        return self.shards.explicit_negatives_of(row)

    def users_of(self, rows: I64) -> list[int]:
        """The numbers (user_id) of the users of `rows`, each once, in the order of the data.

        Numbers, because these go into logs and metrics: who may read the data set finds the source's name there, beside user_id.
        """
        return [int(user) for user in self.user_ids[np.unique(rows)]]

    def names_of(self, rows: I64) -> list[str]:
        """The source's name of the user of each of `rows`."""
        return [self.shards.raw_user(row) for row in rows.tolist()]


@dataclass(frozen=True)
class PreparedData:
    """An opened data set: its catalogue is in memory, its splits are opened by split().

    titles[i], raw_items[i] and categories[i] belong to item i; train_counts (I,) is how often it occurs in rows of the train
    split.
    """

    source: Source
    manifest: Manifest
    titles: list[str]
    raw_items: list[str]
    categories: list[list[str]]
    train_counts: I64

    @staticmethod
    def open(path: str | Path, *, cache: str | None = None, cache_bytes: int = CACHE_BYTES) -> "PreparedData":
        """Opens the data set at `path` (data.path), a folder or a URI, through the node's cache.

        Reads the manifest, compares the sizes of all files with it, and reads items.arrow. Raises UserError if there is no
        prepared data set, a file is missing, has another size or is not in the manifest, or items.arrow is damaged.
        """
        location = Location(path)
        manifest = Manifest.load(location)
        if manifest.items is None:
            raise UserError(
                f"data.path ({location}) holds preference rows, which have no items to rank; "
                "train on them with task.kind=sft, dpo, dmpo, sdpo, mppo or dynamicpo."
            )
        if problems := folder_faults(location, manifest):
            raise UserError(f"data.path ({location}) is damaged, {len(problems)} fault(s): {problems[0]}; {PREPARE_AGAIN}.")
        source = Source(location, NodeCache(cache_folder(cache), cache_bytes))
        table, _ = source.table(manifest.items, ITEM_SCHEMA)
        return PreparedData(
            source=source,
            manifest=manifest,
            titles=table["title"].to_pylist(),
            raw_items=table["raw_item"].to_pylist(),
            categories=table["categories"].to_pylist(),
            train_counts=flat(table["train_count"].chunks, np.int64),
        )

    @property
    def location(self) -> Location:
        """The folder or URI of the data set."""
        return self.source.location

    @property
    def num_items(self) -> int:
        """I, the size of the catalogue."""
        return len(self.titles)

    @cached_property
    def held_out(self) -> I32:
        """The items that data.cold_items_fraction held out of training, with others that training never met; none without it."""
        cold = np.flatnonzero(self.train_counts == 0) if self.manifest.settings.get("cold_items_fraction") else np.empty(0)
        return cold.astype(np.int32)

    def split(self, name: str) -> SequenceSplit:
        """Opens the index of the split "train", "valid" or "test"; shards are opened later.

        Raises UserError for another name or a damaged index.
        """
        entry = self.manifest.splits.get(name)
        if entry is None:
            raise UserError(f"{name} is not a split of {self.location}; its splits are {', '.join(self.manifest.splits)}.")
        assert entry.index is not None, "open() rejects a data set without users"
        index = read_index(self.source.table(entry.index, INDEX_SCHEMA)[0])
        return SequenceSplit(
            name=name,
            user_ids=index.user_ids,
            offsets=index.offsets,
            first_target=index.first_target,
            explicit_negative_offsets=index.explicit_negative_offsets,
            shards=Shards(self.source, entry.shards, index),
        )

    def cache_notes(self, split: str, window: int | None) -> list[str]:
        """Warns if an order that is shuffled in windows of `window` examples would fetch the same shards again and again."""
        size, room = sum(entry.bytes for entry in self.manifest.splits[split].shards), self.source.cache.max_bytes
        if not self.location.is_remote or window is not None or size <= room:
            return []
        return [
            f"WARNING: the {split} split ({size:,} bytes) is larger than data.cache_bytes ({room:,}), so each node "
            "fetches its shards again and again; raise data.cache_bytes, or set train.shuffle_window"
        ]

    def copy_items(self, target: Path) -> None:
        """Writes items.arrow to the path `target`."""
        assert self.manifest.items is not None, "open() rejects a data set without items"
        with self.source.cache.opened(self.location, self.manifest.items) as path:
            shutil.copyfile(path, target)


def open_data(config: DataConfig) -> PreparedData:
    """Opens the data set at data.path. Raises UserError as PreparedData.open does."""
    return PreparedData.open(config.path, cache=config.cache_dir, cache_bytes=config.cache_bytes)


def cache_folder(named: str | None) -> Path:
    """The absolute path of data.cache_dir; by default a folder in this package's cache."""
    return local_path(named) if named else cache_dir() / "data"
