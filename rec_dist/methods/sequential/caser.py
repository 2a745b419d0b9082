"""Caser: convolutions over the last items of a history as over an image, with a next-item softmax over the whole catalogue.

Cost a row: D * (H * sum_{h=1..K} h (K - h + 1) + K * V) multiply-adds, K * D floats of images. Nothing is padded to a grid.

T rows of all sequences, M scored rows, I items of the catalogue, D width, K items of the window, H and V filters.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rec_dist.methods.sequential.item_embedding import ItemEmbedding
from rec_dist.methods.sequential.sequences import SequenceBatch


@dataclass(frozen=True)
class CaserShape:
    """The arguments of the module. num_items I; width D; window K, the items read; num_horizontal H, filters of each height 1..K;
    num_vertical V; max_length: the most items of a training sequence, at least K."""

    num_items: int
    width: int
    window: int
    num_horizontal: int
    num_vertical: int
    dropout: float
    max_length: int


class Caser(nn.Module):
    """Tang & Wang, Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding (arXiv 1809.07426).

        E (K, D) the last K items, zeros before the first
        horizontal, height h, filter f:  max_i relu(<F_hf, E[i : i + h]> + b_hf)     vertical, filter v:  sum_k w_vk E[k] + c_v
        hidden = relu(W [horizontal; vertical] + b)                                  logits = <hidden, item_i>

    Differences from the paper: no user embedding, so users without training rows can be ranked; cross-entropy over the whole
    catalogue instead of the binary loss with 3 sampled negatives; one target a window (T = 1), at every position; output weights
    tied to the item embeddings; a bias for each vertical filter.
    """

    def __init__(self, shape: CaserShape) -> None:
        super().__init__()
        self.shape = shape
        width, window = shape.width, shape.window
        self.item_embedding = ItemEmbedding(shape.num_items, width)
        self.horizontal = nn.ModuleList(nn.Conv1d(width, shape.num_horizontal, height) for height in range(1, window + 1))
        # A vertical filter (K, 1) has one weight an item, the same in every column.
        self.vertical = nn.Linear(window, shape.num_vertical)
        self.join = nn.Linear(shape.num_horizontal * window + shape.num_vertical * width, width)

    def encode(self, batch: SequenceBatch) -> Tensor:
        """The input of the softmax at every position: (T, D). Row t reads the last K items of its sequence up to t."""
        images = self._windows(self.item_embedding(batch.items), batch)  # (T, D, K)
        wide = [F.relu(convolution(images)).amax(dim=2) for convolution in self.horizontal]  # each (T, H)
        seen = torch.cat([*wide, self.vertical(images).flatten(1)], dim=1)  # (T, H * K + D * V)
        return F.relu(self.join(F.dropout(seen, self.shape.dropout, self.training)))

    def _windows(self, items: Tensor, batch: SequenceBatch) -> Tensor:
        """(T, D) -> (T, D, K), with zeros before a sequence's first item rather than its neighbour in the batch."""
        back = torch.arange(1 - self.shape.window, 1, device=items.device)  # (K,) oldest first
        rows = torch.arange(len(items), device=items.device).unsqueeze(1) + back  # (T, K)
        inside = batch.positions.unsqueeze(1) + back >= 0
        return (items[rows.clamp(min=0)] * inside.unsqueeze(2)).transpose(1, 2)

    def score(self, hidden: Tensor, items: Tensor | None = None) -> Tensor:
        """Rows of encode (M, D) -> logits of the catalogue (M, I), or of `items` as in ItemEmbedding.forward."""
        logits: Tensor = self.item_embedding(hidden, items)
        return logits
