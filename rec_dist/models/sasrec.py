"""SASRec: a causal transformer over item ids whose next-item softmax covers the whole catalogue.

Why the whole catalogue: the binary loss with one sampled negative of the first release is the weak form that makes a
baseline easy to beat. Cost a scored position: I * D multiply-adds and I floats of logits; tokens_per_pack bounds both.
A batch is a flat run of rows without padding, so a pack costs what its tokens say; only attention pads (Block._attend).

B sequences, T rows of all of them, L rows of the longest, M scored rows, I items of the catalogue, D width, H heads.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rec_dist.stream.trunk import I32


@dataclass(frozen=True)
class SASRecShape:
    """What builds the module. num_items I; width D, a multiple of num_heads; max_length: positions it has embeddings for."""

    num_items: int
    width: int
    num_layers: int
    num_heads: int
    dropout: float
    max_length: int

    def as_dict(self) -> dict[str, int | float]:
        """The fields by name: SASRecShape(**shape.as_dict()) is the shape again."""
        return asdict(self)


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences one after another, and the positions whose next item is scored. `weights` is 0 only in a stand-in."""

    items: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64: 0..n-1 within each sequence
    slots: Tensor  # (T,) int64: place in the padded grid of B * L that attention works on
    ends: Tensor  # (B,) int64: the row of each sequence's last item
    rows: Tensor  # (M,) int64: the row that predicts each target
    targets: Tensor  # (M,) int64 item ids
    weights: Tensor  # (M,) float32, 0 or 1
    longest: int  # L

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.items)

    @property
    def num_groups(self) -> int:
        """Targets that count: 0 in a stand-in."""
        return int((self.weights > 0).sum())

    @property
    def num_logical_tokens(self) -> int:
        """T, or 0 in a stand-in: nothing is shared here that a peer would write out again."""
        return self.num_tokens if self.num_groups else 0

    def to(self, device: str) -> "SequenceBatch":
        """The same batch on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "longest"}
        return replace(self, **moved)


def lay_out(sequences: Sequence[I32], scored: Sequence[I32]) -> SequenceBatch:
    """One batch: inputs sequences[b] (n_b >= 1,) and scored[b], the targets of its last len(scored[b]) positions."""
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
        longest=longest,
    )


def stand_in() -> SequenceBatch:
    """The smallest batch, of weight 0: run by a rank with nothing to do, since every rank must run the same collectives."""
    nothing = np.zeros(1, dtype=np.int32)
    return replace(lay_out([nothing], [nothing]), weights=torch.zeros(1))


def history_batch(histories: Sequence[I32], max_length: int) -> SequenceBatch:
    """The last max_length items of each history, for SASRec.scores; nothing is scored against a target.

    ValueError: an empty history, which a next-item model has nothing to say about.
    """
    for number, history in enumerate(histories):
        if len(history) == 0:
            raise ValueError(f"history {number} is empty; a sequential model needs at least 1 item")
    none = np.empty(0, dtype=np.int32)
    return lay_out([history[-max_length:] for history in histories], [none] * len(histories))


class Catalogue(nn.Module):
    """One table for both ends. Its reads stay inside its own forward, where ZeRO-3 gathers it."""

    def __init__(self, num_items: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_items, width) * width**-0.5)

    def forward(self, values: Tensor) -> Tensor:
        """Item ids (...) int64 -> embeddings (..., D); hidden rows (M, D) float -> logits (M, I)."""
        if values.is_floating_point():
            return F.linear(values, self.weight)
        return F.embedding(values, self.weight) * math.sqrt(self.weight.shape[1])


class Block(nn.Module):
    """Causal self-attention and a two-layer ReLU network, each as x + dropout(f(norm(x))).

    The paper also drops attention weights; that keeps a fused kernel from being used and doubles the time of a step.
    """

    def __init__(self, shape: SASRecShape) -> None:
        super().__init__()
        width = shape.width
        self.num_heads, self.dropout = shape.num_heads, shape.dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, batch: SequenceBatch) -> Tensor:
        """(T, D) -> (T, D)."""
        x = x + F.dropout(self.mix(self._attend(self.attention_norm(x), batch)), self.dropout, self.training)
        return x + F.dropout(self.narrow(F.relu(self.widen(self.feed_norm(x)))), self.dropout, self.training)

    def _attend(self, x: Tensor, batch: SequenceBatch) -> Tensor:
        """(T, D) -> (T, D). Only here are sequences padded, on the right, where a causal mask lets nothing look."""
        width, heads = x.shape[1], self.num_heads
        grid = x.new_zeros(len(batch.ends) * batch.longest, 3 * width).index_copy(0, batch.slots, self.queries_keys_values(x))
        parts = grid.view(len(batch.ends), batch.longest, 3, heads, width // heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)  # (B, H, L, D / H)
        return seen.transpose(1, 2).reshape(-1, width)[batch.slots]


class SASRec(nn.Module):
    """Kang & McAuley, Self-Attentive Sequential Recommendation (arXiv 1808.09781), with cross-entropy over the catalogue.

    Pre-norm blocks, learnt positions counted from the oldest item shown, output weights tied to the item embeddings.
    """

    def __init__(self, shape: SASRecShape) -> None:
        super().__init__()
        self.shape = shape
        self.catalogue = Catalogue(shape.num_items, shape.width)
        self.positions = nn.Embedding(shape.max_length, shape.width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.last_norm = nn.LayerNorm(shape.width)

    def hidden(self, batch: SequenceBatch) -> Tensor:
        """What stands before the softmax at every position: (T, D)."""
        assert batch.longest <= self.shape.max_length, f"{batch.longest} items for {self.shape.max_length} positions"
        x = F.dropout(self.catalogue(batch.items) + self.positions(batch.positions), self.shape.dropout, self.training)
        for block in self.blocks:
            x = block(x, batch)
        rows: Tensor = self.last_norm(x)
        return rows

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """-> (loss_sum (), sums (2,) = loss and count without graph, logps (M,) of the targets, in nats, without graph).

        loss_sum = -sum_m w_m log softmax_i(<hidden_m, item_i>)[target_m].
        """
        logits = self.catalogue(self.hidden(batch)[batch.rows])  # (M, I)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")  # (M,)
        loss_sum = (losses * batch.weights).sum()
        sums = torch.stack([loss_sum.detach().double(), batch.weights.sum().double()])
        return loss_sum, sums, -losses.detach()

    def scores(self, batch: SequenceBatch) -> Tensor:
        """Logits of the whole catalogue after each sequence's last item: (B, I)."""
        logits: Tensor = self.catalogue(self.hidden(batch)[batch.ends])
        return logits
