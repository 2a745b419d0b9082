"""The catalogue of a language model as a search sees it: the nodes of its trie of titles, scored after one history.

The prompt runs once, and each token of a title once at most (models/token_tree.py). Under the score `trie` a token without an
alternative adds nothing, so a node runs only if it branches, or leads to one that does. Under `raw` every token counts.

n nodes of a call, c their children, D width.
"""

import numpy as np
import torch
from torch import Tensor

from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.prompts.compressed_trie import compress
from rec_dist.data.prompts.title_trie import completions_of, trie_of
from rec_dist.models.head import CompletionHead
from rec_dist.models.probe import check_same, probe_tokens
from rec_dist.models.scorer import Scorer
from rec_dist.models.token_tree import TokenTree
from rec_dist.ranking.search import Search
from rec_dist.runtime.arrays import F64, I32, I64
from rec_dist_kernels import AllowedChunk, AllowedPlan, allowed_logps, completion_logps

ROWS_AT_ONCE = 256  # of a pass: more would run nodes whose bound falls below the threshold meanwhile
PIECE = 4  # tokens of a node under `raw`: a title may be given up after each, and a pass goes so many tokens down


class CatalogueTrie:
    """The trie of all completions of `builder`, for the score `raw` (temperature None) or `trie`.

    rows (Q,): as in ranking.search.Expander.
    """

    def __init__(self, builder: PromptBuilder, temperature: float | None) -> None:
        tokens, offsets = completions_of(builder)
        plain = trie_of(tokens, offsets)
        self.temperature = temperature
        self.nodes = compress(
            plain, plain.ends_of(tokens.astype(np.int64), offsets), longest=PIECE if temperature is None else None
        )
        leaf = self.nodes.num_children == 0
        lengths = self.nodes.lengths
        self.rows = lengths - leaf if temperature is None else np.where(leaf, 0, lengths)


class TitleExpander:
    """Implements Expander after the prompt `tokens` (P,)."""

    def __init__(self, module: Scorer, catalogue: CatalogueTrie, tokens: I64) -> None:
        self._head: CompletionHead = module.head
        self._nodes, self._temperature, self.rows = catalogue.nodes, catalogue.temperature, catalogue.rows
        with torch.no_grad():
            self._tree = TokenTree(module.base, tokens)
        self._row = np.full(self._nodes.num_nodes, -1, dtype=np.int64)  # (Q,) of each node's last token
        self._row[0] = len(tokens) - 1

    @torch.no_grad()
    def expand(self, nodes: I64) -> tuple[F64, F64]:
        """As Expander.expand. Node 0 comes alone."""
        trie = self._nodes
        fed = offsets_of(self.rows[nodes])  # (n+1,) into the rows of this call
        if nodes[0] == 0:
            hidden, fed = self._tree.last_hidden, np.asarray([0, 1])
        else:
            first = len(self._tree)
            tokens = trie.tokens[runs(trie.token_offsets[nodes], self.rows[nodes])]
            parents = first + np.arange(len(tokens)) - 1
            parents[fed[:-1]] = self._row[trie.parents[nodes]]
            hidden = self._tree.run(tokens, parents.tolist())
            self._row[nodes] = first + fed[1:] - 1
        if self._temperature is None:
            return self._over_vocabulary(hidden, nodes, fed)
        return np.zeros(len(nodes)), self._over_titles(hidden, nodes, fed, self._temperature)

    def _over_vocabulary(self, hidden: Tensor, nodes: I64, fed: I64) -> tuple[F64, F64]:
        trie = self._nodes
        tails = np.maximum(trie.lengths[nodes] - 1, 0)  # (n,) tokens of a node after its first; node 0 has none at all
        degrees = trie.num_children[nodes]
        rows = np.concatenate([runs(fed[:-1], tails), np.repeat(fed[1:] - 1, degrees)])
        targets = np.concatenate([trie.tokens[runs(trie.token_offsets[nodes] + 1, tails)], self._firsts(nodes)])
        offsets = offsets_of(np.concatenate([tails, np.ones(int(degrees.sum()), dtype=np.int64)]))
        arrays = (torch.from_numpy(array).to(hidden.device) for array in (rows, targets, offsets))
        head = self._head
        logps = completion_logps(hidden, head.weight, *arrays, bias=head.bias, softcap=head.softcap)
        values = logps.double().cpu().numpy()
        return values[: len(nodes)], values[len(nodes) :]

    def _over_titles(self, hidden: Tensor, nodes: I64, fed: I64, temperature: float) -> F64:
        firsts, degrees = self._firsts(nodes), self._nodes.num_children[nodes]
        owner = np.repeat(np.arange(len(nodes)), degrees)  # (c,)
        words, place = np.unique(firsts, return_inverse=True)
        each = np.arange(len(firsts))
        every = slice(0, len(firsts))
        chunk = AllowedChunk(slice(0, len(nodes)), every, slice(0, len(words)), every, len(nodes))
        ends = offsets_of(np.ones(len(firsts), dtype=np.int64))
        columns = (fed[1:] - 1, np.arange(len(nodes)), owner, place, each, each, ends, words, owner * len(words) + place)
        arrays = (torch.from_numpy(column).to(hidden.device) for column in columns)
        plan = AllowedPlan._make((*arrays, (chunk,), temperature))
        head = self._head
        logps = allowed_logps(hidden, head.weight, plan, bias=head.bias, softcap=head.softcap)
        return logps.double().cpu().numpy()

    def _firsts(self, nodes: I64) -> I64:
        """The first tokens of the children of nodes (n,): (c,)."""
        return self._nodes.tokens[self._nodes.token_offsets[self._nodes.children_of(nodes)]]


def search_titles(
    module: Scorer,
    builder: PromptBuilder,
    catalogue: CatalogueTrie,
    history: I32,
    prior: F64 | None,
    weight: float,
    max_tokens: int,
) -> Search:
    """A search after the last prompt.max_history items of a history. max_tokens: rows of the model that fit at once."""
    prompt = builder.prompt(history[-builder.max_history :]).astype(np.int64)
    model = TitleExpander(module, catalogue, prompt)
    return Search(catalogue.nodes, model, prior=prior, weight=weight, rows_at_once=min(ROWS_AT_ONCE, max_tokens))


@torch.no_grad()
def check_kept(module: Scorer, dtype: torch.dtype) -> None:
    """Raises UserError if states change when keys and values of earlier rows are kept. dtype: the model's."""
    tokens = probe_tokens(module.vocab_size).astype(np.int64)
    prompt, answer = tokens[:9], tokens[20:24]
    alone = TokenTree(module.base, np.concatenate([prompt, answer])).last_hidden[0]
    tree = TokenTree(module.base, prompt)
    tree.run(tokens[30:32], [8, 9])  # a branch that the other must not see
    tree.run(answer[:2], [8, 11])
    found = tree.run(answer[2:], [12, 13])[-1]
    check_same(found, alone, dtype, what="this model's states change", when="keys and values are kept")
