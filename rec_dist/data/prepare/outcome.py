"""The result of preparing interactions, in memory or block by block, that goes into the manifest."""

from dataclasses import dataclass

from rec_dist.data.dataset.manifest import SplitEntry
from rec_dist.storage.checksums import FileEntry


@dataclass(frozen=True)
class Counts:
    """What happened to the rows. followers: positives that follow another positive of the same user."""

    raw_rows: int
    repeated_rows: int
    titles_with_year: int
    merged_items: int
    core_dropped_positives: int
    users: int
    items: int
    positives: int
    explicit_negatives: int
    ties: int
    followers: int

    def for_manifest(self) -> dict[str, int]:
        """The counts by name, without followers, which only tie_share uses."""
        return {name: value for name, value in vars(self).items() if name != "followers"}

    @property
    def tie_share(self) -> float:
        """The share of followers with the same timestamp as the positive before them."""
        return self.ties / self.followers if self.followers else 0.0


@dataclass(frozen=True)
class Prepared:
    """The manifest's fields about items and splits, whose files are on disk already."""

    cuts: dict[str, int | None]
    counts: Counts
    bad_rows: dict[str, int]
    notes: list[str]
    items: FileEntry
    splits: dict[str, SplitEntry]
