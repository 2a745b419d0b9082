"""How neighbour tables score: the last items of a history vote for their neighbours, the newest most.

    score(i) = sum_k decay^k (title_weight * title[h_k, i] + next_weight * log(1 + next[h_k, i])
                              + embedding_weight * embedding[h_k, i])
               + popularity_weight * log(1 + positives of i)            h_0 the newest item, h_1 the one before it, ...

B histories, C candidates of a history, I items of the catalogue.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

from rec_dist.evaluation.baselines import Floats, check_lengths
from rec_dist.methods.neighbours.config import NeighboursConfig
from rec_dist.methods.neighbours.tables import NeighbourTables
from rec_dist.runtime.arrays import I32

_VALUES_AT_ONCE = 1 << 24  # of dense rows (B, I)


class NeighboursScorer:
    """Scores as the formula above, in float32. An empty history gets the popularity part alone."""

    def __init__(self, tables: NeighbourTables, settings: NeighboursConfig) -> None:
        self._settings, self._num_items = settings, tables.num_items
        self._popularity = settings.popularity_weight * tables.popularity
        following = tables.following.copy()
        following.data = np.log1p(following.data)
        parts = {
            "title": (settings.title_weight, tables.title),
            "next": (settings.next_weight, following),
            "embedding": (settings.embedding_weight, tables.embedding),
        }
        self._parts = {name: part for name, part in parts.items() if part[0] > 0 and part[1] is not None}

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """Scores as CandidateScorer.score does."""
        check_lengths(histories, candidates)
        scores: list[Floats] = []
        wanted = iter(candidates)
        for votes in self._votes_of(histories):
            whole = np.tile(self._popularity, (votes.shape[0], 1))
            for weight, table in self._parts.values():
                whole += weight * (votes @ table).toarray()
            scores += [row[next(wanted)].astype(np.float64) for row in whole]
        return scores

    def score_parts(self, histories: Sequence[I32], candidates: Sequence[I32]) -> dict[str, list[Floats]]:
        """As PartsScorer.score_parts: "title", "next" and "embedding", as far as they have a weight, without it."""
        check_lengths(histories, candidates)
        parts: dict[str, list[Floats]] = {name: [] for name in self._parts}
        for name, (_, table) in self._parts.items():
            wanted = iter(candidates)
            for votes in self._votes_of(histories):
                parts[name] += [row[next(wanted)].astype(np.float64) for row in (votes @ table).toarray()]
        return parts

    def _votes_of(self, histories: Sequence[I32]) -> Iterator[sparse.csr_array]:
        """The votes of blocks of histories in order, (b, I) each."""
        at_once = max(1, _VALUES_AT_ONCE // self._num_items)
        for begin in range(0, len(histories), at_once):
            yield self._votes(histories[begin : begin + at_once])

    def _votes(self, histories: Sequence[I32]) -> sparse.csr_array:
        """(B, I): the weight of each item of the histories; an item that occurs twice has the sum."""
        kept = [history[-self._settings.max_history :] for history in histories]
        sizes = np.asarray([len(history) for history in kept])
        rows = np.repeat(np.arange(len(kept)), sizes)
        age = np.concatenate([np.arange(size)[::-1] for size in sizes]) if len(sizes) else np.empty(0)
        weights = (self._settings.decay**age).astype(np.float32)
        columns = np.concatenate(kept) if kept else np.empty(0, dtype=np.int32)
        return sparse.csr_array((weights, (rows, columns)), shape=(len(kept), self._num_items))
