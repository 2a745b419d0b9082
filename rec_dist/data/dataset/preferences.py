"""An opened data set of preference rows: prompts as text, and their completions, the chosen one first.

`prepare` writes batches of rows to the shards in turn. Reading the shards in turn restores the order of the source file for any
number of shards.
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
from rec_dist.data.dataset.schema import PREFERENCE_SCHEMA, PREPARE_AGAIN, PreferenceRow
from rec_dist.data.dataset.verify import folder_faults
from rec_dist.errors import UserError
from rec_dist.storage.location import Location

BATCH_ROWS = 1024  # rows of a batch in a shard


@dataclass(frozen=True)
class PreferenceData:
    """An opened data set of preference rows. Its text stays in the mapped files until you read it."""

    manifest: Manifest
    table: pa.Table

    @staticmethod
    def open(path: str | Path, *, cache: str | None = None, cache_bytes: int = CACHE_BYTES) -> "PreferenceData":
        """Opens all shards of the data set at `path` (data.path), a folder or a URI, through the node's cache.

        Raises UserError if it is not a prepared data set of preference rows, is damaged, or is remote and larger than the cache.
        """
        location = Location(path)
        manifest = Manifest.load(location)
        if manifest.kind != PREFERENCES:
            raise UserError(
                f"data.path ({location}) holds interactions, not preference rows; prepare it with data.format=preferences."
            )
        if problems := folder_faults(location, manifest):
            raise UserError(f"data.path ({location}) is damaged, {len(problems)} fault(s): {problems[0]}; {PREPARE_AGAIN}.")
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
        """Yields all rows, `batch_rows` at a time."""
        for batch in self.table.to_batches(max_chunksize=batch_rows):
            prompts, completions = (batch.column(name).to_pylist() for name in ("prompt", "completions"))
            yield [PreferenceRow(prompt, texts) for prompt, texts in zip(prompts, completions, strict=True)]


def open_preferences(config: DataConfig) -> PreferenceData:
    """Opens the preference rows at data.path. Raises UserError as PreferenceData.open does."""
    return PreferenceData.open(config.path, cache=config.cache_dir, cache_bytes=config.cache_bytes)
