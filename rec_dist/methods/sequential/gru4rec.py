"""GRU4Rec: a gated recurrent network over item ids whose next-item softmax covers the whole catalogue.

Cost a row: 3 (D + E) E multiply-adds a layer. The L steps run one after another, so long sequences are slow on a GPU.

B sequences, T rows of all of them, L rows of the longest, M scored rows, I items of the catalogue, D width, E width of the state.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from rec_dist.methods.sequential.item_embedding import ItemEmbedding
from rec_dist.methods.sequential.sequences import SequenceBatch, from_grid, to_grid


@dataclass(frozen=True)
class GRU4RecShape:
    """The arguments of the module. num_items I; width D; state_width E; max_length: the most items it reads."""

    num_items: int
    width: int
    state_width: int
    num_layers: int
    dropout: float
    max_length: int


class GRU4Rec(nn.Module):
    """Hidasi et al., Session-based Recommendations with Recurrent Neural Networks (arXiv 1511.06939): embedding, GRU, projection.

        r = s(W_ir x + b_ir + W_hr h + b_hr)    z = s(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))    h <- (1 - z) * n + z * h    logits = <W_p h + b_p, item_i>

    Differences from the paper: cross-entropy over the whole catalogue instead of BPR or TOP1 on the items of the mini-batch;
    learnt embeddings, tied to the output weights, instead of one-hot input; a state that starts at 0 for each sequence instead of
    session-parallel batches; PyTorch's GRU, which applies r after the product with h; AdamW instead of Adagrad.
    """

    def __init__(self, shape: GRU4RecShape) -> None:
        super().__init__()
        self.shape = shape
        self.item_embedding = ItemEmbedding(shape.num_items, shape.width)
        between = shape.dropout if shape.num_layers > 1 else 0.0  # PyTorch drops between layers, and warns if there is only one
        self.gru = nn.GRU(shape.width, shape.state_width, shape.num_layers, batch_first=True, dropout=between)
        self.project = nn.Linear(shape.state_width, shape.width)

    def encode(self, batch: SequenceBatch) -> Tensor:
        """The input of the softmax at every position: (T, D). States read from the left, so they never read padding."""
        items = F.dropout(self.item_embedding(batch.items), self.shape.dropout, self.training)  # (T, D)
        states, _ = self.gru(to_grid(items, batch))  # (B, L, E)
        rows: Tensor = self.project(F.dropout(from_grid(states, batch), self.shape.dropout, self.training))
        return rows

    def score(self, hidden: Tensor, items: Tensor | None = None) -> Tensor:
        """Rows of encode (M, D) -> logits of the catalogue (M, I), or of `items` as in ItemEmbedding.forward."""
        logits: Tensor = self.item_embedding(hidden, items)
        return logits
