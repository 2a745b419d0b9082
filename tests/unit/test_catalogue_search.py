"""The search over a trie of titles against brute force: random tries, ties, titles that begin others, priors, budgets, exact ranks.

The next token's score comes from a table of multiples of 1/8, so that sums are exact and ties are real.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.prompts.compressed_trie import CompressedTrie, compress
from rec_dist.data.prompts.title_trie import trie_of
from rec_dist.errors import NotFiniteError
from rec_dist.ranking.search import Search
from rec_dist.runtime.arrays import F64, I64

Sequences = list[list[int]]
NextToken = Callable[[tuple[int, ...], int], float]  # the tokens before, the token -> what it adds
# Few tokens make titles that share a beginning, are equal, or begin others; some are long enough for several pieces.
SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=30)


def built(sequences: Sequences, longest: int | None) -> CompressedTrie:
    tokens = np.asarray([token for sequence in sequences for token in sequence], dtype=np.int32)
    offsets = offsets_of(np.asarray([len(sequence) for sequence in sequences], dtype=np.int64))
    plain = trie_of(tokens, offsets)
    return compress(plain, plain.ends_of(tokens.astype(np.int64), offsets), longest=longest)


def table(seed: int, sequences: Sequences, *, within_titles: bool) -> NextToken:
    """-0/8, -1/8, ... or -inf, by hash. within_titles: 0 for a token without an alternative, as the score `trie` has it."""
    alternatives: dict[tuple[int, ...], set[int]] = {}
    for sequence in sequences:
        for place, token in enumerate(sequence):
            alternatives.setdefault(tuple(sequence[:place]), set()).add(token)

    def value(before: tuple[int, ...], token: int) -> float:
        if within_titles and len(alternatives[before]) == 1:
            return 0.0
        drawn = hash((seed, before, token)) % 13
        return -np.inf if drawn == 12 else -drawn / 8

    return value


class TableExpander:
    """An Expander from a table. Insists that every node comes once, and after its parent."""

    def __init__(self, trie: CompressedTrie, value: NextToken, *, within_titles: bool) -> None:
        leaf = trie.num_children == 0
        self.rows: I64 = np.where(leaf, 0, trie.lengths) if within_titles else trie.lengths - leaf
        self._trie, self._value, self.expanded = trie, value, {-1}

    def path(self, node: int) -> tuple[int, ...]:
        """All tokens up to the end of a node."""
        above = () if node == 0 else self.path(int(self._trie.parents[node]))
        return (*above, *self._trie.tokens[self._trie.token_offsets[node] : self._trie.token_offsets[node + 1]].tolist())

    def expand(self, nodes: I64) -> tuple[F64, F64]:
        tails, heads = [], []
        for node in nodes.tolist():
            assert node not in self.expanded and int(self._trie.parents[node]) in self.expanded
            whole, length = self.path(node), int(self._trie.lengths[node])
            start = len(whole) - length + 1
            tails.append(sum(self._value(whole[:place], whole[place]) for place in range(start, len(whole))) if node else 0.0)
            for child in self._trie.children_of(np.asarray([node])).tolist():
                heads.append(self._value(whole, int(self._trie.tokens[self._trie.token_offsets[child]])))
        self.expanded |= set(nodes.tolist())
        return np.asarray(tails, dtype=np.float64), np.asarray(heads, dtype=np.float64)


def brute_force(sequences: Sequences, value: NextToken, prior: F64, weight: float) -> dict[int, float]:
    """Every item that may be found, with its score."""
    sums = [sum(value(tuple(one[:place]), token) for place, token in enumerate(one)) for one in sequences]
    return {item: weight * total + float(prior[item]) for item, total in enumerate(sums) if prior[item] > -np.inf}


def in_order(scores: dict[int, float]) -> list[tuple[int, float]]:
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


@st.composite
def searches(draw: st.DrawFn) -> tuple[Sequences, NextToken, Search, F64, float, int]:
    """A search, what it searches, and the rows that expanding everything takes."""
    sequences, within_titles = draw(SEQUENCES), draw(st.booleans())
    trie = built(sequences, None if within_titles else draw(st.sampled_from([1, 2, 4, None])))
    value = table(draw(st.integers(0, 1 << 20)), sequences, within_titles=within_titles)
    priors = st.sampled_from([0.0, 0.0, 0.25, -1.0, 2.0, -np.inf])
    prior = np.asarray(draw(st.lists(priors, min_size=len(sequences), max_size=len(sequences))))
    weight = draw(st.sampled_from([0.5, 1.0, 2.0]))
    model = TableExpander(trie, value, within_titles=within_titles)
    search = Search(trie, model, prior=prior, weight=weight, rows_at_once=draw(st.integers(1, 12)))
    return sequences, value, search, prior, weight, int(model.rows.sum())


@settings(max_examples=150, deadline=None)
@given(searches(), st.integers(1, 12), st.integers(1, 6), st.data())
def test_the_list_is_that_of_brute_force(
    made: tuple[Sequences, NextToken, Search, F64, float, int], k: int, beam: int, data: st.DataObject
) -> None:
    """Ties are in the order of items. Whatever is known at the start, and whatever the pass holds, the list is the same."""
    sequences, value, search, prior, weight, total = made
    first = data.draw(st.none() | st.lists(st.integers(0, len(sequences) - 1), max_size=5))
    found = search.top_k(k, beam=beam, first=None if first is None else np.asarray(first, dtype=np.int32))
    assert (
        list(zip(found.items.tolist(), found.scores.tolist(), strict=True))
        == in_order(brute_force(sequences, value, prior, weight))[:k]
    )
    assert found.certified
    assert found.rows <= total


@settings(max_examples=120, deadline=None)
@given(searches(), st.integers(1, 8), st.integers(0, 40), st.booleans())
def test_within_a_budget_scores_are_true_and_a_certificate_is_not_false(
    made: tuple[Sequences, NextToken, Search, F64, float, int], k: int, max_rows: int, exact: bool
) -> None:
    sequences, value, search, prior, weight, _ = made
    found = search.top_k(k, beam=2, max_rows=max_rows, exact=exact)
    everything = brute_force(sequences, value, prior, weight)
    pairs = list(zip(found.items.tolist(), found.scores.tolist(), strict=True))
    assert pairs == in_order({item: everything[item] for item in found.items.tolist()})
    assert found.rows <= max_rows
    if found.certified:
        assert pairs == in_order(everything)[:k]
    again = search.top_k(k, beam=1)  # what was left open is still there
    assert again.certified and list(zip(again.items.tolist(), again.scores.tolist(), strict=True)) == in_order(everything)[:k]


@settings(max_examples=120, deadline=None)
@given(searches(), st.integers(1, 8), st.data())
def test_the_rank_of_an_item_is_that_of_brute_force(
    made: tuple[Sequences, NextToken, Search, F64, float, int], limit: int, data: st.DataObject
) -> None:
    """A tie counts against the target."""
    sequences, value, search, prior, weight, _ = made
    everything = brute_force(sequences, value, prior, weight)
    if not everything:
        return
    target = data.draw(st.sampled_from(sorted(everything)))
    if data.draw(st.booleans()):
        search.top_k(2, beam=1)
    found = search.rank_of(target, limit=limit)
    ahead = sum(score >= everything[target] for item, score in everything.items() if item != target)
    assert (found.rank, found.certified) == (1 + ahead if ahead < limit else None, True)


@settings(max_examples=80, deadline=None)
@given(SEQUENCES, st.sampled_from([1, 2, 3, None]))
def test_paths_of_a_compressed_trie_spell_the_titles(sequences: Sequences, longest: int | None) -> None:
    trie = built(sequences, longest)
    model = TableExpander(trie, lambda before, token: 0.0, within_titles=False)
    assert [model.path(node) for node in trie.node_of.tolist()] == [tuple(sequence) for sequence in sequences]
    assert trie.lengths[0] == 0 and (trie.lengths[1:] >= 1).all()
    paths = [model.path(node) for node in range(trie.num_nodes)]
    assert len(set(paths)) == len(paths)
    children = [trie.children_of(np.asarray([node])).tolist() for node in range(trie.num_nodes)]
    assert sorted(child for own in children for child in own) == list(range(1, trie.num_nodes))
    assert all(trie.parents[child] == node > -1 for node, own in enumerate(children) for child in own)
    ends = set(trie.node_of.tolist())
    for node in range(1, trie.num_nodes):
        if longest is not None:
            assert trie.lengths[node] <= longest
        if len(children[node]) == 1 and node not in ends:  # joined with its child, unless that would be too long
            assert longest is not None and trie.lengths[node] == longest


@settings(max_examples=80, deadline=None)
@given(SEQUENCES, st.data())
def test_the_best_below_a_node(sequences: Sequences, data: st.DataObject) -> None:
    trie = built(sequences, data.draw(st.sampled_from([1, 2, None])))
    some = st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 3.0]), min_size=len(sequences), max_size=len(sequences))
    values = np.asarray(data.draw(some))
    model = TableExpander(trie, lambda before, token: 0.0, within_titles=False)
    for node, best in enumerate(trie.best_below(values).tolist()):
        path = list(model.path(node))
        assert best == max(values[item] for item, one in enumerate(sequences) if one[: len(path)] == path)


def chain(titles: int, tokens: int) -> Sequences:
    """Titles whose first tokens differ, and that are long after it."""
    return [[title, *range(100, 100 + tokens)] for title in range(titles)]


def first_token_decides(before: tuple[int, ...], token: int) -> float:
    return -0.125 * token if not before else -0.01


def test_titles_below_the_threshold_cost_no_rows() -> None:
    """100 titles of 9 tokens: the search runs the best 10 and a few more, not all."""
    trie = built(chain(100, 8), 4)
    model = TableExpander(trie, first_token_decides, within_titles=False)
    assert model.rows.sum() == 100 * 8
    found = Search(trie, model, rows_at_once=16).top_k(10, beam=10)
    assert found.items.tolist() == list(range(10)) and found.certified
    assert found.rows <= 12 * 8


def test_a_trie_score_runs_no_row_for_what_has_no_alternative() -> None:
    trie = built(chain(100, 8), None)
    model = TableExpander(trie, first_token_decides, within_titles=True)
    found = Search(trie, model).top_k(10, beam=1)
    assert (found.items.tolist(), found.rows, found.certified) == (list(range(10)), 0, True)


def test_a_score_that_is_no_number_ends_the_search() -> None:
    trie = built([[0, 1], [0, 2], [3]], None)
    nan = lambda before, token: float("nan") if before else -1.0
    with pytest.raises(NotFiniteError, match="NaN"):
        Search(trie, TableExpander(trie, nan, within_titles=False)).top_k(3, beam=1)


def test_levels_hold_nodes_of_one_depth() -> None:
    trie = built([[1, 2, 3], [1, 2, 4, 5], [6]], 2)
    model = TableExpander(trie, first_token_decides, within_titles=False)
    depths = [
        {len(model.path(node)) - int(trie.lengths[node]) for node in range(a, b)} for a, b in pairwise(trie.levels.tolist())
    ]
    assert all(len(own) <= 1 for own in depths)
