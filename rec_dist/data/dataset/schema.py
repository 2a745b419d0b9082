"""The prepared data set on disk: file names, Arrow schemas and the version of the format. All of data/ relies on this module.

A prepared data set is a folder with manifest.json, items.arrow, {train,valid,test}-00000-of-000NN.arrow and
index-{train,valid,test}.arrow. The Arrow files use the IPC file format without compression, so that they can be memory-mapped:
5.6 GB/s sequential and 50k random rows/s, where compressed formats are 3-15x slower.
"""

from dataclasses import dataclass

import pyarrow as pa

FORMAT_VERSION = 3
SPLITS = ("train", "valid", "test")
MANIFEST_NAME = "manifest.json"
ITEMS_NAME = "items.arrow"
PREPARE_AGAIN = "remove the data set and run `rec-dist prepare CONFIG` again"

# One row per user. Positions before first_target are history only; each position from first_target on is a target of this split.
SEQUENCE_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("raw_user", pa.string(), nullable=False),
        pa.field("items", pa.list_(pa.int32()), nullable=False),
        pa.field("ratings", pa.list_(pa.float32())),
        pa.field("timestamps", pa.list_(pa.int64()), nullable=False),
        pa.field("first_target", pa.int32(), nullable=False),
        # Items rated below data.min_rating, in time order, from the training part only. negatives.kind=low_rated draws from them.
        pa.field("explicit_negatives", pa.list_(pa.int32()), nullable=False),
    ]
)

# What planning batches needs of each row of a split, in the row order of its shards: 20 bytes per user, and no shard is opened.
INDEX_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("num_items", pa.int32(), nullable=False),
        pa.field("first_target", pa.int32(), nullable=False),
        pa.field("num_explicit_negatives", pa.int32(), nullable=False),
    ]
)

# item_id is dense and 0-based: row i is item i. train_count counts rows of the training part, never of valid or test.
ITEM_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.int32(), nullable=False),
        pa.field("raw_item", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("categories", pa.list_(pa.string()), nullable=False),
        pa.field("train_count", pa.int64(), nullable=False),
    ]
)

# Preference rows: completions[0] was chosen, the others were rejected.
PREFERENCE_SCHEMA = pa.schema(
    [pa.field("prompt", pa.string(), nullable=False), pa.field("completions", pa.list_(pa.string()), nullable=False)]
)


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt and its completions: the chosen one first, then at least one rejected one, all different."""

    prompt: str
    completions: list[str]


def shard_name(split: str, index: int, count: int) -> str:
    """`train-00003-of-00016.arrow`."""
    return f"{split}-{index:05d}-of-{count:05d}.arrow"


def index_name(split: str) -> str:
    """`index-train.arrow`."""
    return f"index-{split}.arrow"
