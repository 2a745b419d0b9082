"""What either way of preparing hands back for the manifest."""

from dataclasses import dataclass

from rec_dist.data.manifest import FileEntry, SplitEntry
from rec_dist.data.rules import Counts


@dataclass(frozen=True)
class Prepared:
    """Items and shards lie in their folder; the rest is for the manifest, whose fields have the same meaning."""

    cuts: dict[str, int | None]
    counts: Counts
    bad_rows: dict[str, int]
    notes: list[str]
    items: FileEntry
    splits: dict[str, SplitEntry]
