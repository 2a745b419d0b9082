"""Prompts without completions, packed into one batch, whose rows are pooled into states: an item's embedding, or what a user's
history means, after its end or after each of its items.

It is an ordinary packed batch with prompts only, so attention, packing and padding are the same as in every other pass.

U states, T rows of all prompts, R rows that are pooled, C labels of a state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist.packing.transfer import to_device
from rec_dist.runtime.arrays import I32, I64


@dataclass(frozen=True)
class PooledPrompts:
    """One micro-batch. `weights` is 0 only in a dummy batch."""

    batch: PackedBatch
    rows: Tensor  # (R,) int64: rows of the batch that are pooled
    owners: Tensor  # (R,) int64: the state that each is pooled into
    counts: Tensor  # (U,) float32: rows of each state
    labels: Tensor  # (U, C) float32: what to predict from each state; C = 0 for nothing
    weights: Tensor  # (U,) float32

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.batch.num_tokens

    @property
    def num_groups(self) -> int:
        """States that count: 0 in a dummy batch."""
        return int((self.weights > 0).sum())

    @property
    def num_logical_tokens(self) -> int:
        """T, or 0 in a dummy batch. Without completions, no prompt is shared."""
        return self.num_tokens if self.num_groups else 0

    def to(self, device: str) -> "PooledPrompts":
        """The same prompts on `device`, as PackedBatch.to."""
        return to_device(self, device)


def pack_pooled_prompts(
    prompts: Sequence[I32], num_pooled: Sequence[int], labels: npt.NDArray[np.float32] | None = None
) -> PooledPrompts:
    """One state a prompt. prompts[u]: (P_u >= 1,) token ids, of which the last num_pooled[u] >= 1 rows are pooled.

    labels: (U, C), or None.
    """
    lengths, counts = np.asarray([len(tokens) for tokens in prompts], dtype=np.int64), np.asarray(num_pooled, dtype=np.int64)
    return pack_pooled_spans(prompts, np.arange(len(prompts)), np.stack([lengths - counts, lengths], axis=1), labels)


def pack_pooled_spans(
    prompts: Sequence[I32], of_prompt: I64, spans: I64, labels: npt.NDArray[np.float32] | None = None
) -> PooledPrompts:
    """Any number of states a prompt: state u is pooled from rows spans[u, 0] to spans[u, 1] - 1 of prompt of_prompt[u].

    of_prompt (U,), spans (U, 2). labels: (U, C), or None.
    """
    lengths = np.asarray([len(tokens) for tokens in prompts], dtype=np.int64)
    counts = spans[:, 1] - spans[:, 0]
    assert bool(((spans[:, 0] >= 0) & (counts > 0) & (spans[:, 1] <= lengths[of_prompt])).all()), "a state has no row to pool"
    owners = np.repeat(np.arange(len(spans)), counts)
    first = (np.cumsum(lengths) - lengths)[of_prompt] + spans[:, 0]  # (U,)
    rows = np.arange(len(owners)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    values = np.zeros((len(spans), 0), dtype=np.float32) if labels is None else labels
    return PooledPrompts(
        batch=pack_prompts([_alone(tokens) for tokens in prompts]),
        rows=torch.from_numpy(rows),
        owners=torch.from_numpy(owners),
        counts=torch.from_numpy(counts.astype(np.float32)),
        labels=torch.from_numpy(values),
        weights=torch.ones(len(spans)),
    )


def dummy_batch(num_labels: int) -> PooledPrompts:
    """The smallest micro-batch, of weight 0, for a rank with nothing to do: every rank must run the same collectives."""
    labels = np.full((1, num_labels), 1 / num_labels, dtype=np.float32)
    return replace(pack_pooled_prompts([np.zeros(1, dtype=np.int32)], [1], labels), weights=torch.zeros(1))


def _alone(tokens: I32) -> GroupedPrompt:
    nothing = np.empty(0, dtype=np.int32)
    return GroupedPrompt(
        tokens=tokens,
        branch_points=nothing,
        keys=np.empty(0, dtype=np.int64),
        group_sizes=nothing,
        completion_inputs=nothing,
        input_lengths=nothing,
        lengths=nothing,
        targets=nothing,
    )
