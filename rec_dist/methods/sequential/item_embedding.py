"""The item table of a sequential recommender: input embeddings, and output weights of the next item's softmax.

One table serves both, which halves the weights. Cost of scoring the whole catalogue: I * D multiply-adds a row.

M rows, I items of the catalogue, S selected items, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def initial_std(width: int) -> float:
    """The standard deviation of a new table of this width, which gives an embedding an expected squared length of 1."""
    return float(width**-0.5)


class ItemEmbedding(nn.Module):
    """Input and output embeddings in one table. Only forward() reads it, since ZeRO-3 gathers it there."""

    def __init__(self, num_items: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_items, width) * initial_std(width))

    def forward(self, values: Tensor, items: Tensor | None = None) -> Tensor:
        """Item ids (...) int64 -> embeddings (..., D); hidden rows (M, D) float -> logits of the selected items.

        items: None for the whole catalogue, (M, I); (S,) int64 for the same S items in every row, (M, S); (M, h) int64 for h
        items of each row, (M, h).
        """
        if not values.is_floating_point():
            return F.embedding(values, self.weight) * math.sqrt(self.weight.shape[1])
        if items is None:
            return F.linear(values, self.weight)
        if items.dim() == 1:
            return F.linear(values, F.embedding(items, self.weight))
        return (values.unsqueeze(1) * F.embedding(items, self.weight)).sum(dim=-1)
