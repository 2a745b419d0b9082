"""The item table of a sequential recommender: embeddings on the way in, the next item's softmax on the way out.

One table for both ends: half the weights, and an item is what it predicts. Cost of the whole catalogue: I * D multiply-adds a row.

M rows, I items of the catalogue, S items asked for, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def initial_std(width: int) -> float:
    """Of the weights drawn for a table of this width: an embedding has length 1."""
    return float(width**-0.5)


class ItemEmbedding(nn.Module):
    """One table for both ends. Its reads stay inside its own forward, where ZeRO-3 gathers it."""

    def __init__(self, num_items: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_items, width) * initial_std(width))

    def forward(self, values: Tensor, items: Tensor | None = None) -> Tensor:
        """Item ids (...) int64 -> embeddings (..., D); hidden rows (M, D) float -> logits of the items asked for.

        items: None for the whole catalogue, (M, I); (S,) int64 for the same S items in every row, (M, S); (M, 1) int64 for one
        of each row's own, (M, 1).
        """
        if not values.is_floating_point():
            return F.embedding(values, self.weight) * math.sqrt(self.weight.shape[1])
        if items is None:
            return F.linear(values, self.weight)
        if items.dim() == 1:
            return F.linear(values, F.embedding(items, self.weight))
        return (values.unsqueeze(1) * F.embedding(items, self.weight)).sum(dim=-1)
