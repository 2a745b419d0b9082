"""What either way of preparing hands back for the manifest."""

from dataclasses import dataclass

from rec_dist.data.dataset.manifest import SplitEntry
from rec_dist.storage.checksums import FileEntry


@dataclass(frozen=True)
class Counts:
    """What happened to the rows on the way. followers: choices that have a choice of the same user before them."""

    raw_rows: int
    repeated_rows: int
    titles_with_year: int
    merged_items: int
    core_dropped_choices: int
    users: int
    items: int
    choices: int
    explicit_negatives: int
    ties: int
    followers: int

    def for_manifest(self) -> dict[str, int]:
        """Each count under its own name; followers only serves tie_share."""
        return {name: value for name, value in vars(self).items() if name != "followers"}

    @property
    def tie_share(self) -> float:
        """Of the followers, the share with the same timestamp as the choice before."""
        return self.ties / self.followers if self.followers else 0.0


@dataclass(frozen=True)
class Prepared:
    """Items and shards lie in their folder; the rest is for the manifest, whose fields have the same meaning."""

    cuts: dict[str, int | None]
    counts: Counts
    bad_rows: dict[str, int]
    notes: list[str]
    items: FileEntry
    splits: dict[str, SplitEntry]
