"""A prepared data set of preference rows, opened: a prompt as text, and its completions, the chosen one first. It has no users and
no items. Shards hold batches of rows dealt in turn: read in turn, the rows come in the order of their file for any number of shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import PREFERENCES, Manifest
from rec_dist.data.dataset.node_cache import NodeCache
from rec_dist.data.dataset.prepared_data import CACHE_BYTES, cache_folder
from rec_dist.data.dataset.reading import Source
from rec_dist.data.dataset.schema import PREFERENCE_SCHEMA, PreferenceRow
from rec_dist.data.dataset.verify import folder_faults
from rec_dist.errors import UserError
from rec_dist.storage.location import REMEDY, Location

BATCH_ROWS = 1024  # of a batch in a shard


@dataclass(frozen=True)
class PreferenceData:
    """An opened data set of preference rows; its text stays in the mapped files until it is asked for."""

    manifest: Manifest
    table: pa.Table

    @staticmethod
    def open(path: str | Path, *, cache: str | None = None, cache_bytes: int = CACHE_BYTES) -> "PreferenceData":
        """Opens the data set at `path` (data.path), a folder or a URI, through the node's cache: all its shards.

        UserError: no prepared data set of preference rows, a damaged one, or a remote one that is larger than the cache.
        """
        location = Location(path)
        manifest = Manifest.load(location)
        if manifest.kind != PREFERENCES:
            raise UserError(
                f"data.path ({location}) holds interactions, not preference rows; prepare it with data.format=preferences."
            )
        if problems := folder_faults(location, manifest):
            raise UserError(f"data.path ({location}) is damaged, {len(problems)} fault(s): {problems[0]}; {REMEDY}.")
        shards = manifest.splits["train"].shards
        size = sum(shard.bytes for shard in shards)
        if location.is_remote and size > cache_bytes:
            raise UserError(
                f"data.cache_bytes ({cache_bytes}) is smaller than the preference rows at {location} ({size} bytes), which are "
                "read all at once; raise it."
            )
        source = Source(location, NodeCache(cache_folder(cache), cache_bytes))
        tables = [source.table(shard, PREFERENCE_SCHEMA)[0] for shard in shards]
        turns = zip_longest(*(table.to_batches() for table in tables))
        batches = [batch for turn in turns for batch in turn if batch is not None]
        return PreferenceData(manifest, pa.Table.from_batches(batches, schema=PREFERENCE_SCHEMA))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def rows(self, batch_rows: int = BATCH_ROWS) -> Iterator[list[PreferenceRow]]:
        """All rows, some at a time."""
        for batch in self.table.to_batches(max_chunksize=batch_rows):
            prompts, completions = (batch.column(name).to_pylist() for name in ("prompt", "completions"))
            yield [PreferenceRow(prompt, texts) for prompt, texts in zip(prompts, completions, strict=True)]


def open_preferences(config: DataConfig) -> PreferenceData:
    """The preference rows at data.path. UserError: as PreferenceData.open."""
    return PreferenceData.open(config.path, cache=config.cache_dir, cache_bytes=config.cache_bytes)
