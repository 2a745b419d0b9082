"""The trie of titles with its paths compressed (a radix trie): what a search over the catalogue walks.

A node is a piece of one or more tokens, of which only the last may have several continuations or end a title. Node 0 is the empty
beginning. Nodes are numbered level by level, so parents come before children, and the children of a node are neighbours.
Cost: some passes over the trie, once for a catalogue; 60 bytes for each node.

I items, Q nodes, N nodes of the plain trie.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.prompts.title_trie import TitleTrie
from rec_dist.runtime.arrays import F64, I32, I64


@dataclass(frozen=True)
class CompressedTrie:
    """Node q holds tokens[token_offsets[q] : token_offsets[q + 1]], and titles of items[item_offsets[q] : item_offsets[q + 1]] end
    with it.

    Its children are first_child[q], first_child[q] + 1, ..., num_children[q] of them.
    """

    tokens: I64
    token_offsets: I64  # (Q+1,)
    parents: I64  # (Q,), -1 for node 0
    first_child: I64  # (Q,)
    num_children: I64  # (Q,)
    items: I32  # (I,)
    item_offsets: I64  # (Q+1,)
    levels: I64  # nodes levels[d] to levels[d + 1] - 1 begin with the d-th token of a title

    @property
    def num_nodes(self) -> int:
        """Q."""
        return len(self.parents)

    @property
    def lengths(self) -> I64:
        """(Q,): tokens of each node."""
        return np.diff(self.token_offsets)

    @cached_property
    def node_of(self) -> I64:
        """(I,): the node that each item's title ends with."""
        nodes = np.empty(len(self.items), dtype=np.int64)
        nodes[self.items] = np.repeat(np.arange(self.num_nodes), np.diff(self.item_offsets))
        return nodes

    def children_of(self, nodes: I64) -> I64:
        """The children of nodes (n,), one node's behind another's."""
        return runs(self.first_child[nodes], self.num_children[nodes])

    def items_of(self, nodes: I64) -> tuple[I32, I64]:
        """The items whose titles end with nodes (n,), and which of the n each belongs to."""
        counts = np.diff(self.item_offsets)[nodes]
        return self.items[runs(self.item_offsets[nodes], counts)], np.repeat(np.arange(len(nodes)), counts)

    def path_to(self, items: I32) -> I64:
        """The nodes that lead to the ends of these items' titles, without node 0."""
        found: list[I64] = []
        nodes = np.unique(self.node_of[items])
        while len(nodes := nodes[nodes > 0]):
            found.append(nodes)
            nodes = np.unique(self.parents[nodes])
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))

    def best_below(self, values: F64) -> F64:
        """values (I,) of items -> (Q,): the largest of those whose titles end at or below each node."""
        best = np.full(self.num_nodes, -np.inf)
        np.maximum.at(best, self.node_of, values)
        for start, stop in reversed(list(pairwise(self.levels.tolist()))[1:]):
            np.maximum.at(best, self.parents[start:stop], best[start:stop])
        return best


def compress(trie: TitleTrie, ends: I64, *, longest: int | None = None) -> CompressedTrie:
    """Joins the nodes of `trie` that have one continuation and end no title. ends (I,): the plain node where each title ends.

    longest: the most tokens of a node, None without a limit.
    """
    degrees = np.diff(trie.child_offsets)  # (N,)
    parents = np.concatenate([[-1], np.repeat(np.arange(trie.num_nodes), degrees)])  # (N,)
    joined = degrees == 1  # (N,) whether a node is one with its child
    joined[ends] = False
    joined[0] = False
    levels = [0, 1]  # where each level of the plain trie begins
    while levels[-1] < trie.num_nodes:
        levels.append(int(trie.child_offsets[levels[-1]]) + 1)
    place = np.zeros(trie.num_nodes, dtype=np.int64)  # (N,) of a plain node in its piece
    for start, stop in pairwise(levels[1:]):
        above = parents[start:stop]
        place[start:stop] = np.where(joined[above], place[above] + 1, 0)
    first = place == 0 if longest is None else place % longest == 0  # (N,) whether a piece begins
    owner = np.cumsum(first) - 1  # (N,) the piece of each plain node
    for start, stop in pairwise(levels[1:]):
        owner[start:stop] = np.where(first[start:stop], owner[start:stop], owner[parents[start:stop]])
    heads = np.flatnonzero(first)
    lengths = np.bincount(owner)
    lengths[0] = 0
    above = np.concatenate([[-1], owner[parents[heads[1:]]]])
    first_child = np.zeros(len(heads), dtype=np.int64)
    first_child[above[:0:-1]] = np.arange(len(heads) - 1, 0, -1)  # of a repeated index the last value stays: the first child
    end_nodes = owner[ends]
    return CompressedTrie(
        tokens=trie.child_tokens[np.argsort(owner, kind="stable")[1:] - 1].astype(np.int64),
        token_offsets=offsets_of(lengths),
        parents=above,
        first_child=first_child,
        num_children=np.bincount(above[1:], minlength=len(heads)),
        items=np.argsort(end_nodes, kind="stable").astype(np.int32),
        item_offsets=offsets_of(np.bincount(end_nodes, minlength=len(heads))),
        levels=np.searchsorted(heads, levels),
    )
