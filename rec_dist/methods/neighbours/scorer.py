"""How neighbour tables score: the last items of a history vote for their neighbours, the newest most.

    score(i) = sum_k decay^k (title_weight * title[h_k, i] + next_weight * log(1 + next[h_k, i]))
               + popularity_weight * log(1 + positives of i)            h_0 the newest item, h_1 the one before it, ...

B histories, C candidates of a history, I items of the catalogue.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

from rec_dist.evaluation.baselines import Floats, check_lengths
from rec_dist.methods.neighbours.config import NeighboursConfig
from rec_dist.methods.neighbours.tables import NeighbourTables
from rec_dist.runtime.arrays import I32

_VALUES_AT_ONCE = 1 << 24  # of dense rows (B, I)


class NeighboursScorer:
    """Scores as the formula above, in float32. An empty history gets the popularity part alone."""

    def __init__(self, tables: NeighbourTables, settings: NeighboursConfig) -> None:
        self._tables, self._settings = tables, settings
        following = tables.following.copy()
        following.data = np.log1p(following.data)
        self._following = following

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """Scores as CandidateScorer.score does."""
        check_lengths(histories, candidates)
        settings, scores = self._settings, []
        popularity = settings.popularity_weight * self._tables.popularity
        wanted = iter(candidates)
        for title, following in self._blocks(histories):
            whole = settings.title_weight * title + settings.next_weight * following + popularity
            scores += [row[next(wanted)].astype(np.float64) for row in whole]
        return scores

    def score_parts(self, histories: Sequence[I32], candidates: Sequence[I32]) -> dict[str, list[Floats]]:
        """As PartsScorer.score_parts: "title" and "next", without their weights."""
        check_lengths(histories, candidates)
        parts: dict[str, list[Floats]] = {"title": [], "next": []}
        wanted = iter(candidates)
        for title, following in self._blocks(histories):
            for title_row, next_row in zip(title, following, strict=True):
                items = next(wanted)
                parts["title"].append(title_row[items].astype(np.float64))
                parts["next"].append(next_row[items].astype(np.float64))
        return parts

    def _blocks(self, histories: Sequence[I32]) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Blocks of histories in order: the title part and the next-item part of every item, (b, I) each, without weights."""
        at_once = max(1, _VALUES_AT_ONCE // self._tables.num_items)
        for begin in range(0, len(histories), at_once):
            votes = self._votes(histories[begin : begin + at_once])
            yield (votes @ self._tables.title).toarray(), (votes @ self._following).toarray()

    def _votes(self, histories: Sequence[I32]) -> sparse.csr_array:
        """(B, I): the weight of each item of the histories; an item that occurs twice has the sum."""
        kept = [history[-self._settings.max_history :] for history in histories]
        sizes = np.asarray([len(history) for history in kept])
        rows = np.repeat(np.arange(len(kept)), sizes)
        age = np.concatenate([np.arange(size)[::-1] for size in sizes]) if len(sizes) else np.empty(0)
        weights = (self._settings.decay**age).astype(np.float32)
        columns = np.concatenate(kept) if kept else np.empty(0, dtype=np.int32)
        return sparse.csr_array((weights, (rows, columns)), shape=(len(kept), self._tables.num_items))
