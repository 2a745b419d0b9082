"""Prepares preference rows. Writes batches of rows to the shards in turn, which bounds memory for any number of rows.

All rows train; prepare held-out rows as a data set of their own.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import SplitEntry
from rec_dist.data.dataset.preferences import BATCH_ROWS
from rec_dist.data.dataset.schema import PREFERENCE_SCHEMA, PreferenceRow, shard_name
from rec_dist.data.sources.interactions import BadRows
from rec_dist.data.sources.preferences import PreferenceReader
from rec_dist.errors import UserError
from rec_dist.storage.checksums import FileEntry, describe

logger = logging.getLogger(__name__)

# Keys of the section data that shape interactions and have no effect on preference rows.
_OF_INTERACTIONS = (
    *("split", "valid_fraction", "test_fraction", "min_rating", "min_user_interactions", "min_item_interactions"),
    *("max_train_users", "cold_items_fraction", "columns", "prepare_on"),
)


@dataclass(frozen=True)
class PreparedPreferences:
    """The parts of a manifest that are specific to preference rows."""

    counts: dict[str, int]
    bad_rows: dict[str, int]
    notes: list[str]
    splits: dict[str, SplitEntry]


def check_settings(config: DataConfig) -> None:
    """Raises UserError for settings that have no effect on preference rows."""
    for name in _OF_INTERACTIONS:
        default = DataConfig.model_fields[name].get_default(call_default_factory=True)
        if getattr(config, name) != default:
            raise UserError(f"data.{name} has no effect on data.format=preferences: every row trains; remove it.")


def prepare_preferences(path: Path, config: DataConfig, folder: Path) -> PreparedPreferences:
    """Writes the rows of one file into `folder`. Raises UserError if no row is usable, or more than data.max_bad_rows are bad."""
    bad, reader = BadRows(), PreferenceReader(clean_text=config.clean_text)
    num_rows, most = 0, 0
    shards = [folder / shard_name("train", index, config.num_shards) for index in range(config.num_shards)]
    held = [0] * len(shards)
    with ExitStack() as stack:
        writers = []
        for shard in shards:
            sink = stack.enter_context(pa.OSFile(str(shard), "wb"))
            writers.append(stack.enter_context(pa.ipc.new_file(sink, PREFERENCE_SCHEMA)))
        for number, rows in enumerate(_batches(reader.read(path, bad))):
            columns = [[row.prompt for row in rows], [row.completions for row in rows]]
            arrays = [pa.array(values, kind) for values, kind in zip(columns, PREFERENCE_SCHEMA.types, strict=True)]
            writers[number % len(writers)].write_batch(pa.RecordBatch.from_arrays(arrays, schema=PREFERENCE_SCHEMA))
            held[number % len(writers)] += len(rows)
            num_rows += len(rows)
            most = max(most, *(len(row.completions) - 1 for row in rows))
    bad.check(config.max_bad_rows)
    notes = reader.notes() + bad.notes()
    for note in notes:
        logger.info(note)
    if num_rows == 0:
        raise UserError(f"data.source ({config.source}) holds no usable preference row; correct the file. {bad.describe()}")
    logger.info(f"{num_rows} preference rows, at most {most} rejected completions per row")
    entries: list[FileEntry] = [describe(shard, rows) for shard, rows in zip(shards, held, strict=True)]
    return PreparedPreferences(
        counts={"rows": num_rows, "most_rejected": most},
        bad_rows=bad.in_order(),
        notes=notes,
        splits={"train": SplitEntry(rows=num_rows, targets=num_rows, shards=entries)},
    )


def _batches(rows: Iterator[PreferenceRow]) -> Iterator[list[PreferenceRow]]:
    held: list[PreferenceRow] = []
    for row in rows:
        held.append(row)
        if len(held) == BATCH_ROWS:
            yield held
            held = []
    if held:
        yield held
