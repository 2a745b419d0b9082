"""Prompts without completions, packed into one batch, of which each is pooled into one state: an item's embedding or a user's
state.

It is an ordinary packed batch with prompts only, so attention, packing and padding are the same as in every other pass.

U prompts, T rows of all of them, R rows that are pooled, C labels of a prompt.
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
from rec_dist.runtime.arrays import I32


@dataclass(frozen=True)
class PooledPrompts:
    """One micro-batch. `weights` is 0 only in a dummy batch."""

    batch: PackedBatch
    rows: Tensor  # (R,) int64: rows of the batch that are pooled
    owners: Tensor  # (R,) int64: the prompt of each
    counts: Tensor  # (U,) float32: rows of each prompt
    labels: Tensor  # (U, C) float32: what to predict from each prompt; C = 0 for nothing
    weights: Tensor  # (U,) float32

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.batch.num_tokens

    @property
    def num_groups(self) -> int:
        """Prompts that count: 0 in a dummy batch."""
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
    """prompts[u]: (P_u >= 1,) token ids, of which the last num_pooled[u] >= 1 rows are pooled. labels: (U, C), or None."""
    assert all(0 < count <= len(tokens) for tokens, count in zip(prompts, num_pooled, strict=True)), "a prompt has no row to pool"
    lengths, counts = np.asarray([len(tokens) for tokens in prompts]), np.asarray(num_pooled, dtype=np.int64)
    owners = np.repeat(np.arange(len(prompts)), counts)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.repeat(np.cumsum(lengths) - counts, counts) + within
    values = np.zeros((len(prompts), 0), dtype=np.float32) if labels is None else labels
    return PooledPrompts(
        batch=pack_prompts([_alone(tokens) for tokens in prompts]),
        rows=torch.from_numpy(rows),
        owners=torch.from_numpy(owners),
        counts=torch.from_numpy(counts.astype(np.float32)),
        labels=torch.from_numpy(values),
        weights=torch.ones(len(prompts)),
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
