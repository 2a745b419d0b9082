"""The exact top-k of a catalogue whose titles are scored token by token, without scoring every title: branch and bound on a trie.

A title's score is the sum of its tokens' log-probabilities, times a weight, plus a prior of the item. No token adds anything above
0, so a partial sum and the best prior below a node bound all titles below it. First a beam is scored in full: the k-th best of
its titles is the threshold. Then nodes whose bound reaches the threshold are expanded, best bound first, many in one pass of the
model. When none is left, the list is exact, ties included: that is the certificate.
Cost beside the model: sorts of the open nodes in each pass, about 1 ms for 10,000 of them.

I items, Q nodes of the trie, n nodes of a call, c their children, k items of a list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from rec_dist.data.prompts.compressed_trie import CompressedTrie
from rec_dist.evaluation.baselines import CandidateScorer
from rec_dist.evaluation.metrics import check_numbers
from rec_dist.ranking.selection import best_of
from rec_dist.runtime.arrays import F64, I32, I64

# raw: log-probabilities over the vocabulary. trie: over the tokens that some title goes on with.
Score = Literal["raw", "trie"]
Choose = Callable[[I64, F64], npt.NDArray[np.bool_]]  # nodes (n,), bounds (n,) -> which of them to expand
_NOTHING: tuple[I64, F64] = (np.empty(0, dtype=np.int64), np.empty(0))


class Expander(Protocol):
    """A model that scores the nodes of a trie after one history.

    rows (Q,): how many rows of the model it takes to expand each node. A node without children that takes none is known already.
    """

    @property
    def rows(self) -> I64: ...

    def expand(self, nodes: I64) -> tuple[F64, F64]:
        """Nodes (n,), each once, after their parents -> what the tokens of each add after its first (n,), and what the first
        token of each of its children adds (c,), in the order of trie.children_of(nodes). All in nats, none above 0.
        """
        ...


@dataclass(frozen=True)
class Found:
    """Items (n,) with scores (n,), the best first. rows: rows of the model that were run, without those of the prompt.

    certified: whether no item that was left out belongs here.
    """

    items: I32
    scores: F64
    certified: bool
    rows: int


@dataclass(frozen=True)
class TargetRank:
    """rank: of an item, from 1, or None if it is beyond the limit. certified, rows: as in Found; uncertified, it may be later."""

    rank: int | None
    certified: bool
    rows: int


@runtime_checkable
class SearchScorer(CandidateScorer, Protocol):
    """A scorer that can search the catalogue."""

    def scoring_by(self, score: Score) -> "SearchScorer":
        """The same model with this score. Raises UserError if it cannot have it."""
        ...

    def search(self, history: I32, *, prior: F64 | None = None, weight: float = 1.0) -> "Search":
        """A search after a history. prior, weight: as in Search."""
        ...


class Search:
    """A search after one history. What was scored in one call is known in the next.

    prior (I,): added to the score of each item, -inf for an item that must not be found; None for 0. weight > 0: of the title's
    log-probability. rows_at_once: the most rows of a pass, unless one node takes more.
    """

    def __init__(
        self, trie: CompressedTrie, model: Expander, *, prior: F64 | None = None, weight: float = 1.0, rows_at_once: int = 256
    ) -> None:
        assert 0 < weight < np.inf, f"weight is {weight}"
        self._trie, self._model, self._weight, self._rows_at_once = trie, model, weight, rows_at_once
        self._prior = np.zeros(len(trie.items)) if prior is None else prior
        self._best = trie.best_below(self._prior)  # (Q,)
        self._free = (trie.num_children == 0) & (model.rows == 0)  # (Q,) known from the parent
        self.rows = 0
        self._items, self._scores = np.empty(0, dtype=np.int32), np.empty(0)  # of all titles that are scored
        self._open = self._expand(np.zeros(1, dtype=np.int64), np.zeros(1))  # nodes, and the sums up to their first tokens

    def top_k(self, k: int, *, beam: int, max_rows: int | None = None, first: I32 | None = None, exact: bool = True) -> Found:
        """The best k items with a finite prior, equal scores in ascending order of items.

        beam: the most nodes that a step of the beam keeps. first: items to score in full at the start, such as another model's best.
        max_rows: when so many rows are run, the best so far comes back. exact False: so it does after the beam.
        """
        limit = np.inf if max_rows is None else max_rows
        if first is not None:
            path = self._on_path(first)
            self._dive(lambda nodes, bounds: path[nodes], limit)
        self._dive(lambda nodes, bounds: _largest(bounds, beam) & (bounds >= self._threshold(k)), limit)
        done = self._exhaust(lambda: self._threshold(k), limit if exact else 0)
        best = best_of(self._items, self._scores, k)
        return Found(self._items[best], self._scores[best], done, self.rows)

    def rank_of(self, target: int, *, limit: int = 100, max_rows: int | None = None) -> TargetRank:
        """The exact rank of an item, None if `limit` others or more score as high. A tie counts against the target."""
        assert np.isfinite(self._prior[target]), f"item {target} is left out"
        most = np.inf if max_rows is None else max_rows
        path = self._on_path(np.asarray([target], dtype=np.int32))
        self._dive(lambda nodes, bounds: path[nodes], np.inf)
        score = float(self._scores[self._items == target][0])

        def ahead() -> int:
            return int((self._scores >= score).sum()) - 1

        done = self._exhaust(lambda: score if ahead() < limit else np.inf, most)
        return TargetRank(1 + ahead() if ahead() < limit else None, done, self.rows)

    def _on_path(self, items: I32) -> npt.NDArray[np.bool_]:
        on_path = np.zeros(self._trie.num_nodes, dtype=bool)
        on_path[self._trie.path_to(items)] = True
        return on_path

    def _threshold(self, k: int) -> float:
        """The score of the k-th best item so far, -inf if there are fewer."""
        if len(self._scores) < k:
            return -np.inf
        return float(np.partition(self._scores, len(self._scores) - k)[len(self._scores) - k])

    def _bounds(self, nodes: I64, sums: F64) -> F64:
        return self._weight * sums + self._best[nodes]

    def _dive(self, choose: Choose, limit: float) -> None:
        """Expands what `choose` takes of the open nodes, then of their children, and so on. limit: of rows."""
        (nodes, sums), self._open = self._open, _NOTHING
        while len(nodes):
            chosen = choose(nodes, self._bounds(nodes, sums))
            self._add(nodes[~chosen], sums[~chosen])
            nodes, sums = self._expand_all(nodes[chosen], sums[chosen], limit)

    def _exhaust(self, threshold: Callable[[], float], limit: float) -> bool:
        """Expands nodes while some bound reaches the threshold. Returns whether none does; False: `limit` rows are run."""
        while True:
            nodes, sums = self._open
            bounds = self._bounds(nodes, sums)
            needed = np.flatnonzero(bounds >= threshold())
            needed = needed[np.lexsort((nodes[needed], -bounds[needed]))]
            costs = np.cumsum(self._model.rows[nodes[needed]])
            taken = int(np.searchsorted(costs, min(self._rows_at_once, limit - self.rows), side="right"))
            if not taken and len(needed) and self.rows + costs[0] <= limit:
                taken = 1
            if not taken:
                return not len(needed)
            now = needed[:taken]
            later = np.ones(len(nodes), dtype=bool)
            later[now] = False
            self._open = nodes[later], sums[later]
            self._add(*self._expand(nodes[now], sums[now]))

    def _expand_all(self, nodes: I64, sums: F64, limit: float) -> tuple[I64, F64]:
        """_expand in passes of at most rows_at_once rows. What is beyond the limit stays open."""
        found = [_NOTHING]
        while len(nodes):
            costs = np.cumsum(self._model.rows[nodes])
            taken = max(1, int(np.searchsorted(costs, self._rows_at_once, side="right")))
            if self.rows + costs[taken - 1] > limit:
                self._add(nodes, sums)
                break
            found.append(self._expand(nodes[:taken], sums[:taken]))
            nodes, sums = nodes[taken:], sums[taken:]
        return np.concatenate([nodes for nodes, _ in found]), np.concatenate([sums for _, sums in found])

    def _expand(self, nodes: I64, sums: F64) -> tuple[I64, F64]:
        """One pass of the model: notes the titles that it completes, and returns the children that lead to others."""
        tails, heads = self._model.expand(nodes)
        check_numbers(tails)
        check_numbers(heads)
        self.rows += int(self._model.rows[nodes].sum())
        ends = sums + tails
        self._note(nodes, ends)
        children = self._trie.children_of(nodes)
        reached = np.repeat(ends, self._trie.num_children[nodes]) + heads
        free = self._free[children]
        self._note(children[free], reached[free])
        alive = ~free & (self._best[children] > -np.inf)
        return children[alive], reached[alive]

    def _note(self, nodes: I64, sums: F64) -> None:
        """Scores the titles that end with nodes (n,)."""
        items, owner = self._trie.items_of(nodes)
        allowed = self._prior[items] > -np.inf
        items, owner = items[allowed], owner[allowed]
        self._items = np.concatenate([self._items, items])
        self._scores = np.concatenate([self._scores, self._weight * sums[owner] + self._prior[items]])

    def _add(self, nodes: I64, sums: F64) -> None:
        self._open = np.concatenate([self._open[0], nodes]), np.concatenate([self._open[1], sums])


def _largest(values: F64, most: int) -> npt.NDArray[np.bool_]:
    """Which of values (n,) are the `most` largest, the first of equal ones."""
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[:most]] = True
    return chosen
