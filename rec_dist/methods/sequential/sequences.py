"""A batch of item sequences: flat rows without padding, so that its cost follows its items. All recommenders read it.

B sequences, T rows of all of them, L rows of the longest, M scored rows, S drawn negatives, h items of a teacher's list, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rec_dist.packing.transfer import to_device
from rec_dist.runtime.arrays import F32, F64, I32, I64


@dataclass(frozen=True)
class SequenceBatch:
    """Concatenated sequences, and the positions whose next item is scored. `weights` is 0 only in a dummy batch."""

    items: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64: 0..n-1 within each sequence
    slots: Tensor  # (T,) int64: index in the padded grid of B * L on which attention works
    ends: Tensor  # (B,) int64: the row of each sequence's last item
    rows: Tensor  # (M,) int64: the row that predicts each target
    targets: Tensor  # (M,) int64 item ids
    weights: Tensor  # (M,) float32, 0 or 1
    negatives: Tensor  # (S,) int64 items for the estimate of the softmax; S = 0: the whole catalogue
    log_expected: Tensor  # (S,) float32, log of the expected count of each among the S draws
    listed: Tensor  # (M, h) int64: a teacher's best items at each target; h = 0 without a teacher
    shares: Tensor  # (M, h) float32: the teacher's probability of each, which sum to 1, or to 0 where a target has no list
    longest: int  # L

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.items)

    @property
    def num_groups(self) -> int:
        """Targets that count: 0 in a dummy batch."""
        return int((self.weights > 0).sum())

    @property
    def num_logical_tokens(self) -> int:
        """T, or 0 in a dummy batch. Sequences share no prompt, so they would take as many tokens anywhere else."""
        return self.num_tokens if self.num_groups else 0

    def with_negatives(self, items: I64, log_expected: F64) -> "SequenceBatch":
        """The same batch with drawn negatives; items (S,), log_expected (S,)."""
        return replace(
            self,
            negatives=torch.from_numpy(items.astype(np.int64)),
            log_expected=torch.from_numpy(log_expected.astype(np.float32)),
        )

    def with_lists(self, listed: I32, shares: F32) -> "SequenceBatch":
        """The same batch with a teacher's lists; listed, shares (M, h)."""
        return replace(self, listed=torch.from_numpy(listed.astype(np.int64)), shares=torch.from_numpy(shares))

    def to(self, device: str) -> "SequenceBatch":
        """The same batch on `device`: one copy that the host does not wait for."""
        return to_device(self, device)


def lay_out(sequences: Sequence[I32], scored: Sequence[I32]) -> SequenceBatch:
    """One batch of inputs sequences[b] (n_b >= 1,). scored[b]: the targets of its last len(scored[b]) positions."""
    assert len(sequences) == len(scored) > 0, "a batch needs a sequence, and each sequence its targets"
    lengths = np.asarray([len(sequence) for sequence in sequences], dtype=np.int64)  # (B,)
    counts = np.asarray([len(targets) for targets in scored], dtype=np.int64)  # (B,)
    assert bool(((counts <= lengths) & (lengths > 0)).all()), "a sequence needs an item, and no more targets than positions"
    ends, longest = np.cumsum(lengths), int(lengths.max())
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)  # (T,)
    slots = np.repeat(np.arange(len(sequences)) * longest, lengths) + positions  # (T,)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # (M,) 0-based place among its own
    rows = np.repeat(ends - counts, counts) + nth  # (M,)
    return SequenceBatch(
        items=torch.from_numpy(np.concatenate(sequences).astype(np.int64)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        ends=torch.from_numpy(ends - 1),
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(np.concatenate(scored).astype(np.int64)),
        weights=torch.ones(len(rows)),
        negatives=torch.empty(0, dtype=torch.int64),
        log_expected=torch.empty(0),
        listed=torch.empty((len(rows), 0), dtype=torch.int64),
        shares=torch.empty((len(rows), 0)),
        longest=longest,
    )


def dummy_batch() -> SequenceBatch:
    """The smallest batch, of weight 0. A rank without work runs it, since every rank must run the same collectives."""
    nothing = np.zeros(1, dtype=np.int32)
    return replace(lay_out([nothing], [nothing]), weights=torch.zeros(1))


def history_batch(histories: Sequence[I32], max_length: int) -> SequenceBatch:
    """The last max_length items of each history, without targets, for next_item.last_scores.

    Raises ValueError for an empty history, after which a next-item model cannot predict.
    """
    for number, history in enumerate(histories):
        if len(history) == 0:
            raise ValueError(f"history {number} is empty; a sequential model needs at least 1 item")
    none = np.empty(0, dtype=np.int32)
    return lay_out([history[-max_length:] for history in histories], [none] * len(histories))


def to_grid(rows: Tensor, batch: SequenceBatch) -> Tensor:
    """(T, D) -> (B, L, D), padded with zeros on the right, for models that read from left to right."""
    grid = rows.new_zeros(len(batch.ends) * batch.longest, rows.shape[1]).index_copy(0, batch.slots, rows)
    return grid.view(len(batch.ends), batch.longest, rows.shape[1])


def from_grid(grid: Tensor, batch: SequenceBatch) -> Tensor:
    """(B, L, D) -> (T, D), without the padding."""
    return grid.reshape(-1, grid.shape[2])[batch.slots]
