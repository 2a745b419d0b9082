"""A prepared data set of preference rows: a prompt as text, and its completions, the chosen one first. It has no users and no items.

Shards hold batches of rows dealt in turn, so memory is bounded and the number of rows need not be known; read in turn, the rows
come in the order of their file for any number of shards. All rows train: held-out data is a data set of its own.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset import CACHE_BYTES, cache_folder
from rec_dist.data.interactions import BadRows
from rec_dist.data.location import REMEDY, Location
from rec_dist.data.manifest import PREFERENCES, FileEntry, Manifest, SplitEntry, describe_file
from rec_dist.data.node_cache import NodeCache
from rec_dist.data.readers.preferences import PreferenceRow, read_preferences
from rec_dist.data.reading import Source
from rec_dist.data.rules import Log
from rec_dist.data.schema import PREFERENCE_SCHEMA, shard_name
from rec_dist.data.verify import folder_faults
from rec_dist.runtime.errors import UserError

_BATCH_ROWS = 1024
# Keys of the section data that shape interactions; on preference rows they have no effect.
_OF_INTERACTIONS = (
    *("split", "valid_fraction", "test_fraction", "min_rating", "min_user_interactions", "min_item_interactions"),
    *("max_train_users", "columns", "prepare_on"),
)


@dataclass(frozen=True)
class PreparedPreferences:
    """What of a manifest is particular to preference rows."""

    counts: dict[str, int]
    bad_rows: dict[str, int]
    notes: list[str]
    splits: dict[str, SplitEntry]


def check_settings(config: DataConfig) -> None:
    """UserError for settings that preference rows leave without effect."""
    for name in _OF_INTERACTIONS:
        default = DataConfig.model_fields[name].get_default(call_default_factory=True)
        if getattr(config, name) != default:
            raise UserError(f"data.{name} has no effect on data.format=preferences: every row trains; remove it.")


def prepare_preferences(path: Path, config: DataConfig, folder: Path, *, log: Log) -> PreparedPreferences:
    """Writes the rows of one file into `folder`. UserError: no usable row, or more bad ones than data.max_bad_rows."""
    bad = BadRows()
    num_rows, most = 0, 0
    shards = [folder / shard_name("train", index, config.num_shards) for index in range(config.num_shards)]
    held = [0] * len(shards)
    with ExitStack() as stack:
        writers = []
        for shard in shards:
            sink = stack.enter_context(pa.OSFile(str(shard), "wb"))
            writers.append(stack.enter_context(pa.ipc.new_file(sink, PREFERENCE_SCHEMA)))
        for number, rows in enumerate(_batches(read_preferences(path, bad))):
            columns = [[row.prompt for row in rows], [row.completions for row in rows]]
            arrays = [pa.array(values, kind) for values, kind in zip(columns, PREFERENCE_SCHEMA.types, strict=True)]
            writers[number % len(writers)].write_batch(pa.RecordBatch.from_arrays(arrays, schema=PREFERENCE_SCHEMA))
            held[number % len(writers)] += len(rows)
            num_rows += len(rows)
            most = max(most, *(len(row.completions) - 1 for row in rows))
    bad.check(config.max_bad_rows)
    for note in bad.notes():
        log(note)
    if num_rows == 0:
        raise UserError(f"data.source ({config.source}) holds no preference row that can be used. {bad.describe()}")
    log(f"{num_rows} preference rows, at most {most} rejected completions a row")
    entries: list[FileEntry] = [describe_file(shard, rows) for shard, rows in zip(shards, held, strict=True)]
    return PreparedPreferences(
        counts={"rows": num_rows, "most_rejected": most},
        bad_rows=bad.in_order(),
        notes=bad.notes(),
        splits={"train": SplitEntry(rows=num_rows, targets=num_rows, shards=entries)},
    )


def _batches(rows: Iterator[PreferenceRow]) -> Iterator[list[PreferenceRow]]:
    held: list[PreferenceRow] = []
    for row in rows:
        held.append(row)
        if len(held) == _BATCH_ROWS:
            yield held
            held = []
    if held:
        yield held


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

    def rows(self, batch_rows: int = _BATCH_ROWS) -> Iterator[list[PreferenceRow]]:
        """All rows, some at a time."""
        for batch in self.table.to_batches(max_chunksize=batch_rows):
            prompts, completions = (batch.column(name).to_pylist() for name in ("prompt", "completions"))
            yield [PreferenceRow(prompt, texts) for prompt, texts in zip(prompts, completions, strict=True)]


def open_preferences(config: DataConfig) -> PreferenceData:
    """The preference rows at data.path. UserError: as PreferenceData.open."""
    return PreferenceData.open(config.path, cache=config.cache_dir, cache_bytes=config.cache_bytes)
