"""SASRec: a causal transformer over item ids whose next-item softmax covers the whole catalogue.

Why the whole catalogue: the binary loss with one sampled negative of the first release is a weak form that makes the
baseline easy to beat. Cost a row: 12 D^2 multiply-adds a block, and 2 L D in attention. Only attention pads (Block._attend).

B sequences, T rows of all of them, L rows of the longest, M scored rows, I items of the catalogue, D width, H heads.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from rec_dist.methods.sequential.item_embedding import ItemEmbedding
from rec_dist.methods.sequential.sequences import SequenceBatch, from_grid, to_grid


@dataclass(frozen=True)
class SASRecShape:
    """The arguments of the module. num_items I; width D, a multiple of num_heads; max_length: positions with an embedding."""

    num_items: int
    width: int
    num_layers: int
    num_heads: int
    dropout: float
    max_length: int


class Block(nn.Module):
    """Causal self-attention and a two-layer ReLU network, each as x + dropout(f(norm(x))).

    The paper also drops attention weights, which rules out fused kernels and doubles the time of a step.
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
        """(T, D) -> (T, D). Sequences are padded only here, on the right, which a causal mask hides."""
        width, heads = x.shape[1], self.num_heads
        grid = to_grid(self.queries_keys_values(x), batch)  # (B, L, 3 * D)
        parts = grid.view(*grid.shape[:2], 3, heads, width // heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)  # (B, H, L, D / H)
        return from_grid(seen.transpose(1, 2).flatten(2), batch)


class SASRec(nn.Module):
    """Kang & McAuley, Self-Attentive Sequential Recommendation (arXiv 1808.09781), with cross-entropy over the catalogue.

    Pre-norm blocks, learnt positions counted from the oldest item shown, output weights tied to the item embeddings.
    """

    def __init__(self, shape: SASRecShape) -> None:
        super().__init__()
        self.shape = shape
        self.item_embedding = ItemEmbedding(shape.num_items, shape.width)
        self.positions = nn.Embedding(shape.max_length, shape.width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.last_norm = nn.LayerNorm(shape.width)

    def encode(self, batch: SequenceBatch) -> Tensor:
        """The input of the softmax at every position: (T, D)."""
        assert batch.longest <= self.shape.max_length, f"{batch.longest} items for {self.shape.max_length} positions"
        x = F.dropout(self.item_embedding(batch.items) + self.positions(batch.positions), self.shape.dropout, self.training)
        for block in self.blocks:
            x = block(x, batch)
        rows: Tensor = self.last_norm(x)
        return rows

    def score(self, hidden: Tensor, items: Tensor | None = None) -> Tensor:
        """Rows of encode (M, D) -> logits of the catalogue (M, I), or of `items` as in ItemEmbedding.forward."""
        logits: Tensor = self.item_embedding(hidden, items)
        return logits
