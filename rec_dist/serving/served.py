"""A model that is being served, with the names of its items and users: all that a request needs from its beginning to its end.

A request keeps the one that it began with, so a model that is taken up meanwhile changes nothing for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.ranking.catalogue import ItemNames
from rec_dist.ranking.users import KnownUsers
from rec_dist.serving.batcher import Batcher, Replicas

_SHOWN = 20  # items of a search


@dataclass(frozen=True)
class Loaded:
    """A model, ready to answer. about: what /v1/model says, with the fingerprint `model`. most_titles: None for no limit.

    slow: whether a score takes milliseconds.
    """

    data: PreparedData
    replicas: Replicas
    about: dict[str, Any]
    slow: bool
    most_titles: int | None


class Served:
    """A loaded model, its names, and the queue before its scorers. requests: those that hold it (Switch.asked)."""

    def __init__(self, loaded: Loaded, batcher: Callable[[Loaded], Batcher]) -> None:
        self.about, self.most_titles = loaded.about, loaded.most_titles
        self.raw_items, self.titles = loaded.data.raw_items, loaded.data.titles
        self.names, self.users = ItemNames(loaded.data), KnownUsers(loaded.data)
        self.num_items = loaded.data.num_items
        self.batcher, self.requests = batcher(loaded), 0
        self._folded = [title.casefold() for title in self.titles]
        self._popular = np.argsort(-loaded.data.train_counts, kind="stable").tolist()

    def search(self, words: str) -> list[int]:
        """Up to 20 items: the one with this id, then those whose titles hold all words, the most popular first."""
        wanted = words.casefold().split()
        if not wanted:
            return []
        exact = self.names.numbers([words.strip()]).tolist()
        found = [item for item in exact if item >= 0]
        for item in self._popular:
            if len(found) >= _SHOWN:
                break
            if item not in found and all(word in self._folded[item] for word in wanted):
                found.append(item)
        return found
