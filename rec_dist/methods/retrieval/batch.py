"""A micro-batch of retrieval: prompts with a state at each title, the items that follow, and which logits a learnt term changes.

Everything that depends on item ids is settled here, on the host, so that a GPU's host need not wait: which column of the logits
holds which item of a history, and which rows of logits are in memory together.

M targets (states), P pairs of a state and an item of its history, S drawn negatives, I items, C columns: I, or S if sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rec_dist.data.dataset.ragged import runs
from rec_dist.packing.pooled_prompts import PooledPrompts, pack_pooled_spans
from rec_dist.packing.transfer import to_device
from rec_dist.runtime.arrays import I32, I64

UNSEEN, SEEN, LAST = 0, 1, 2  # how an item stands to a history: not in it, before its last item, or its last item
# Logits held at once: 2 ** 24 float32 are 64 MiB, at any size of catalogue. With 10,000 items 1,677 rows.
LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class RetrievalExample:
    """A prompt (P,) over a user's items, and its targets at positions start .. len(items) - 1 of `items`.

    items: the user's items up to the last target, also those before the prompt. spans (m, 2): the rows that are pooled for each
    target, those of the title before it.
    """

    items: I32
    start: int
    tokens: I32
    spans: I64

    @property
    def num_tokens(self) -> int:
        """Rows of the prompt."""
        return len(self.tokens)

    @property
    def num_groups(self) -> int:
        """Targets."""
        return len(self.spans)

    @property
    def num_scored(self) -> int:
        """Targets: an item is one token of the softmax."""
        return len(self.spans)

    @property
    def num_logical_tokens(self) -> int:
        """num_tokens: targets add no rows to a prompt."""
        return len(self.tokens)

    def pairs(self) -> tuple[I64, I32, I64]:
        """(target, item, SEEN or LAST) of every item in the history of each target, once; ascending by target."""
        before = self.items[:-1]
        places = np.arange(len(before))
        first = np.zeros(len(before), dtype=bool)
        first[np.unique(before, return_index=True)[1]] = True
        ends = np.arange(self.start, len(self.items))[:, None]  # (m, 1): the history of a target is what lies before it
        targets, found = np.nonzero(first & (places < ends))
        items = before[found]
        return targets, items, np.where(items == self.items[self.start - 1 : -1][targets], LAST, SEEN)


class Chunk(NamedTuple):
    """Rows first..last-1 of the logits, which are in memory together, and the pairs first_pair..last_pair-1 on them."""

    first: int
    last: int
    first_pair: int
    last_pair: int


@dataclass(frozen=True)
class RetrievalBatch:
    """One micro-batch. A state is pooled for each target; prompts.weights is 0 only in a dummy batch."""

    prompts: PooledPrompts
    targets: Tensor  # (M,) int64 item ids
    target_relation: Tensor  # (M,) int64: how each target stands to its history
    pair_rows: Tensor  # (P,) int64: the target whose history holds an item, ascending
    pair_columns: Tensor  # (P,) int64: the column of that item in the logits
    pair_relation: Tensor  # (P,) int64: SEEN or LAST
    negatives: Tensor  # (S,) int64 items for the estimate of the softmax; S = 0: the whole catalogue
    log_expected: Tensor  # (S,) float32, log of the expected count of each among the S draws
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.prompts.num_tokens

    @property
    def rows(self) -> Tensor:
        """(R,) the rows of the model that are pooled."""
        return self.prompts.rows

    @property
    def num_groups(self) -> int:
        """Targets that count: 0 in a dummy batch."""
        return self.prompts.num_groups

    @property
    def num_logical_tokens(self) -> int:
        """T, or 0 in a dummy batch."""
        return self.prompts.num_logical_tokens

    def to(self, device: str) -> "RetrievalBatch":
        """The same batch on `device`, as PackedBatch.to."""
        return to_device(self, device)


def pack_retrieval(
    examples: Sequence[RetrievalExample],
    *,
    num_items: int,
    negatives: tuple[I64, npt.NDArray[np.float64]] | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> RetrievalBatch:
    """One micro-batch of at least one example. negatives: (items (S,), log of their expected counts (S,)), None for all items."""
    counts = np.asarray([example.num_groups for example in examples])
    owners = np.repeat(np.arange(len(examples)), counts)
    prompts = pack_pooled_spans(
        [example.tokens for example in examples], owners, np.concatenate([example.spans for example in examples])
    )
    targets = np.concatenate([example.items[example.start :] for example in examples]).astype(np.int64)
    found = [example.pairs() for example in examples]
    pair_rows = np.concatenate([rows + before for (rows, _, _), before in zip(found, np.cumsum(counts) - counts, strict=True)])
    pair_items = np.concatenate([items for _, items, _ in found]).astype(np.int64)
    pair_relation = np.concatenate([relation for _, _, relation in found])
    target_relation = np.zeros(len(targets), dtype=np.int64)
    own = pair_items == targets[pair_rows]
    target_relation[pair_rows[own]] = pair_relation[own]
    items, log_expected = (np.empty(0, np.int64), np.empty(0)) if negatives is None else negatives
    pair_columns = pair_items
    if negatives is not None:
        pairs, pair_columns = columns_of(pair_items, items)
        pair_rows, pair_relation = pair_rows[pairs], pair_relation[pairs]
    at_once = max(1, logits_at_once // (num_items if negatives is None else len(items)))
    return RetrievalBatch(
        prompts=prompts,
        targets=torch.from_numpy(targets),
        target_relation=torch.from_numpy(target_relation),
        pair_rows=torch.from_numpy(pair_rows),
        pair_columns=torch.from_numpy(pair_columns),
        pair_relation=torch.from_numpy(pair_relation),
        negatives=torch.from_numpy(items.astype(np.int64)),
        log_expected=torch.from_numpy(log_expected.astype(np.float32)),
        chunks=_chunks(len(targets), pair_rows, at_once),
    )


def dummy_batch(negatives: tuple[I64, npt.NDArray[np.float64]] | None = None) -> RetrievalBatch:
    """The smallest micro-batch, of weight 0. A rank without work runs it, since every rank must run the same collectives."""
    nothing = np.zeros(1, dtype=np.int32)
    example = RetrievalExample(np.zeros(2, dtype=np.int32), 1, nothing, np.asarray([[0, 1]]))
    batch = pack_retrieval([example], num_items=1, negatives=negatives)
    return replace(batch, prompts=replace(batch.prompts, weights=torch.zeros(1)))


def columns_of(items: I64, negatives: I64) -> tuple[I64, I64]:
    """items (P,), negatives (S,), each with repeats -> (place in items, place in negatives) of all that are equal, in the order
    of items.
    """
    order = np.argsort(negatives, kind="stable")
    lowest, highest = (np.searchsorted(negatives[order], items, side=side) for side in ("left", "right"))
    counts = highest - lowest
    return np.repeat(np.arange(len(items)), counts), order[runs(lowest, counts)]


def _chunks(num_rows: int, pair_rows: I64, at_once: int) -> tuple[Chunk, ...]:
    bounds = [*range(0, num_rows, at_once), num_rows]
    pairs = np.searchsorted(pair_rows, bounds).tolist()
    return tuple(Chunk(bounds[n], bounds[n + 1], pairs[n], pairs[n + 1]) for n in range(len(bounds) - 1))
