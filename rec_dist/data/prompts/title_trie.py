"""The titles of a catalogue as a trie of tokens: which tokens may follow the first tokens of a title.

A node is a distinct beginning of one or more completions (title and end tokens); node 0 is the empty one. Its children are in CSR
form, so a trie is two flat arrays. Cost: a sort of the catalogue's tokens at each depth; 20 bytes for each node. A batch
takes one binary search for each scored token, and no Python loop over tokens.

I items, Q nodes, E = Q - 1 edges, M scored tokens, N completions. R choices and S tokens as in rec_dist_kernels.AllowedPlan.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist.runtime.arrays import I32, I64
from rec_dist_kernels import AllowedChunk, AllowedPlan

CHUNK_LOGITS = 16 << 20  # 64 MB in float32


@dataclass(frozen=True)
class TitleTrie:
    """Node q goes on with child_tokens[child_offsets[q] : child_offsets[q + 1]], ascending; edge e leads to node e + 1.

    vocabulary: more than any token.
    """

    child_offsets: I64  # (Q+1,)
    child_tokens: I32  # (E,)
    vocabulary: int

    @property
    def num_nodes(self) -> int:
        """Q."""
        return len(self.child_offsets) - 1

    @cached_property
    def _keys(self) -> I64:
        """(E,), ascending: one number for each pair of a node and a token that it goes on with."""
        parents = np.repeat(np.arange(self.num_nodes), np.diff(self.child_offsets))
        keys: I64 = parents * self.vocabulary + self.child_tokens
        return keys

    def nodes_of(self, tokens: I64, offsets: I64) -> I64:
        """The node before each of the tokens (M,) of completions at offsets (N+1,): (M,). All must be completions of the trie."""
        lengths = np.diff(offsets)
        nodes = np.zeros(len(tokens), dtype=np.int64)
        active = np.arange(len(lengths))
        for depth in range(1, int(lengths.max(initial=0))):
            active = active[lengths[active] > depth]
            before = offsets[active] + depth - 1
            nodes[before + 1] = self._children(nodes[before], tokens[before])
        return nodes

    def ends_of(self, tokens: I64, offsets: I64) -> I64:
        """The node after the last token of each completion (N,). tokens, offsets: as in nodes_of, none of them empty."""
        last = offsets[1:] - 1
        return self._children(self.nodes_of(tokens, offsets)[last], tokens[last])

    def _children(self, nodes: I64, tokens: I64) -> I64:
        """Where each of the nodes (n,) goes on to with its token."""
        wanted = nodes * self.vocabulary + tokens
        edges = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        assert (self._keys[edges] == wanted).all(), "a completion is no title of the catalogue"
        children: I64 = edges + 1
        return children

    def plan(self, batch: PackedBatch, temperature: float) -> AllowedPlan:
        """What each scored token of `batch` competes with. The batch is on the host, and all of its completions are titles."""
        offsets, targets, rows = (array.numpy() for array in (batch.completion_offsets, batch.targets, batch.rows))
        nodes = self.nodes_of(targets, offsets)
        sizes = np.diff(self.child_offsets)[nodes]  # (M,)
        open_ = np.flatnonzero(sizes > 1)
        tokens = open_[np.lexsort((rows[open_], nodes[open_], -sizes[open_]))]  # (S,) those with most words first, node by node
        new = np.ones(len(tokens), dtype=bool)  # whether a token is the first one of its choice
        new[1:] = (np.diff(nodes[tokens]) != 0) | (np.diff(rows[tokens]) != 0)
        choice, first = np.cumsum(new) - 1, np.flatnonzero(new)  # (S,), (R,)
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[tokens]  # (S,)
        parts, cuts = [], self._cuts(nodes[tokens[first]], sizes[tokens[first]])
        bounds = np.searchsorted(choice, cuts)
        for (begin, stop), (a, b) in zip(pairwise(cuts), pairwise(bounds.tolist()), strict=True):
            parts.append(self._part(nodes[tokens[first[begin:stop]]], choice[a:b] - begin, targets[tokens[a:b]]))
        columns = [_joined([getattr(part, name) for part in parts]) for name in ("nodes", "choices", "targets", "words", "pairs")]
        local, choices, places, words, pairs = columns
        order = np.argsort(owner, kind="stable")
        ends = offsets_of(np.bincount(owner, minlength=len(offsets) - 1))
        arrays = (rows[tokens[first]], local, choices, places, owner, order, ends, words, pairs)
        return AllowedPlan._make((*(torch.from_numpy(array) for array in arrays), _places(parts), temperature))

    def _cuts(self, nodes: I64, sizes: I64) -> list[int]:
        """Where chunks of choices begin, and R. nodes, sizes (R,): the choices with most words first.

        A chunk takes choices while its logits are at most CHUNK_LOGITS, and each has at least half as many words as its first:
        the few thousand first tokens of all titles are not multiplied with rows that have three to choose from.
        """
        cuts, words, most = [0], 0, sizes.tolist()
        same = np.concatenate([[False], np.diff(nodes) == 0]).tolist()
        for place, size in enumerate(most):
            first, more = cuts[-1], 0 if same[place] else size  # a bound: nodes may share words
            full = (place + 1 - first) * (words + more) > CHUNK_LOGITS
            if place > first and (full or 2 * size < most[first]):
                cuts.append(place)
                words, more = 0, size
            words += more
        return [*cuts, len(most)] if most else [0]

    def _part(self, nodes: I64, choices: I64, targets: I64) -> "_Part":
        """A chunk of choices with nodes (C,); each of its tokens has a choice among them and a target."""
        distinct, local = np.unique(nodes, return_inverse=True)
        sizes = np.diff(self.child_offsets)[distinct]
        allowed = self.child_tokens[runs(self.child_offsets[distinct], sizes)].astype(np.int64)
        words = np.unique(allowed)  # (U,)
        pairs = np.repeat(np.arange(len(distinct)), sizes) * len(words) + np.searchsorted(words, allowed)
        return _Part(local, choices, np.searchsorted(words, targets), words, pairs, len(distinct))


@dataclass(frozen=True)
class _Part:
    """As AllowedPlan, for one chunk."""

    nodes: I64
    choices: I64
    targets: I64
    words: I64
    pairs: I64
    num_nodes: int


def _joined(parts: list[I64]) -> I64:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _places(parts: list[_Part]) -> tuple[AllowedChunk, ...]:
    """Where each part lies once they are joined."""
    sizes = [[len(getattr(part, name)) for name in ("nodes", "choices", "words", "pairs")] for part in parts]
    ends = np.cumsum(np.asarray([[0] * 4, *sizes]), axis=0).tolist()
    slices = [[slice(a, b) for a, b in zip(*pair, strict=True)] for pair in pairwise(ends)]
    return tuple(AllowedChunk._make((*own, part.num_nodes)) for own, part in zip(slices, parts, strict=True))


def catalogue_packing(builder: PromptBuilder, temperature: float) -> Callable[[list[GroupedPrompt]], PackedBatch]:
    """pack_prompts for completions of `builder` that compete with its catalogue alone, at this temperature."""
    trie = build_trie(builder)

    def pack(prompts: list[GroupedPrompt]) -> PackedBatch:
        batch = pack_prompts(prompts)
        return replace(batch, allowed=trie.plan(batch, temperature))

    return pack


def build_trie(builder: PromptBuilder) -> TitleTrie:
    """The trie of all completions of `builder`."""
    return trie_of(*completions_of(builder))


def completions_of(builder: PromptBuilder) -> tuple[I32, I64]:
    """The titles of the catalogue, each with its end tokens: tokens (sum,) and offsets (I+1,)."""
    titles, end = builder.titles, np.asarray(builder.pieces.end, dtype=np.int32)
    offsets = offsets_of(titles.lengths + len(end))  # (I+1,)
    tokens = np.empty(offsets[-1], dtype=np.int32)
    tokens[runs(offsets[:-1], titles.lengths)] = titles.tokens
    tokens[(offsets[1:] - len(end))[:, None] + np.arange(len(end))] = end
    return tokens, offsets


def trie_of(tokens: I32, offsets: I64) -> TitleTrie:
    """The trie of the sequences tokens[offsets[i] : offsets[i + 1]]; tokens (sum,), offsets (I+1,)."""
    lengths, vocabulary = np.diff(offsets), 1 + int(tokens.max(initial=0))
    node = np.zeros(len(lengths), dtype=np.int64)  # (I,) where each sequence stands
    edges, num_nodes, active = [np.empty(0, dtype=np.int64)], 1, np.arange(len(lengths))
    for depth in range(int(lengths.max(initial=0))):
        active = active[lengths[active] > depth]
        found, place = np.unique(node[active] * vocabulary + tokens[offsets[active] + depth], return_inverse=True)
        node[active] = num_nodes + place
        num_nodes += len(found)
        edges.append(found)  # nodes are numbered depth by depth, so these keys are larger than those of any depth before
    keys = np.concatenate(edges)
    counts = np.bincount(keys // vocabulary, minlength=num_nodes)
    return TitleTrie(offsets_of(counts), (keys % vocabulary).astype(np.int32), vocabulary)
