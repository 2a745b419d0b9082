"""Next-item prediction with any sequential recommender: the loss that trains it, and its scores after a history.

A model encodes positions and scores items; loss, sampling and use of the scores are the same for all. Cost a scored row: I * D
multiply-adds and I floats of logits, or S * D and S with drawn negatives.

B sequences, T rows of all of them, M scored rows, S drawn negatives, I items of the catalogue, D width.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rec_dist.methods.sequential.caser import Caser, CaserShape
from rec_dist.methods.sequential.gru4rec import GRU4Rec, GRU4RecShape
from rec_dist.methods.sequential.sasrec import SASRec, SASRecShape
from rec_dist.methods.sequential.sequences import SequenceBatch

Recommender = SASRec | GRU4Rec | Caser
Shape = SASRecShape | GRU4RecShape | CaserShape

SHAPES: dict[str, type[Shape]] = {"sasrec": SASRecShape, "gru4rec": GRU4RecShape, "caser": CaserShape}


class SequentialModel(Protocol):
    """A recommender. A row of encode() reads only the items of its sequence up to its own position."""

    def encode(self, batch: SequenceBatch) -> Tensor:
        """(T, D): the input of the softmax at every position."""
        ...

    def score(self, hidden: Tensor, items: Tensor | None = None) -> Tensor:
        """Rows of encode (M, D) -> logits (M, I), or of `items` (S,) for every row (M, S), or (M, 1) for one item of each row."""
        ...


def build_recommender(kind: str, values: Mapping[str, Any]) -> Recommender:
    """The model `kind`, with weights from torch's generator. values: the fields of its shape.

    Raises KeyError for an unknown kind and TypeError for other fields.
    """
    shape = SHAPES[kind](**values)
    if isinstance(shape, SASRecShape):
        return SASRec(shape)
    return GRU4Rec(shape) if isinstance(shape, GRU4RecShape) else Caser(shape)


def last_scores(model: SequentialModel, batch: SequenceBatch) -> Tensor:
    """Logits of the whole catalogue after each sequence's last item: (B, I)."""
    return model.score(model.encode(batch)[batch.ends])


class NextItem(nn.Module):
    """The module that trains: a model and its loss."""

    def __init__(self, model: SequentialModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """-> (loss_sum (), sums (2,) = loss and count without graph, logps (M,) of the targets, in nats, without graph).

        loss_sum = -sum_m w_m log softmax_i(<hidden_m, item_i>)[target_m], or its estimate if the batch has negatives.
        """
        hidden = self.model.encode(batch)[batch.rows]  # (M, D)
        if len(batch.negatives):
            losses = self._sampled(hidden, batch)  # (M,)
        else:
            losses = F.cross_entropy(self.model.score(hidden), batch.targets, reduction="none")  # (M,)
        loss_sum = (losses * batch.weights).sum()
        sums = torch.stack([loss_sum.detach().double(), batch.weights.sum().double()])
        return loss_sum, sums, -losses.detach()

    def _sampled(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        """-l_t + log(exp(l_t) + sum_{j: n_j != t} exp(l_{n_j}) / (S q_{n_j})): (M,), with n_1..n_S drawn from q.

        The expectation of the sum is that of exp(l_i) over all i but t (importance sampling; Bengio & Senecal 2008 call it the
        logQ correction), so loss and gradient approach the full ones as S grows. At a finite S the log makes the loss too small.
        """
        wanted = self.model.score(hidden, batch.targets.unsqueeze(1))  # (M, 1)
        others = self.model.score(hidden, batch.negatives) - batch.log_expected  # (M, S)
        others = others.masked_fill(batch.negatives == batch.targets.unsqueeze(1), float("-inf"))
        return torch.cat([wanted, others], dim=1).logsumexp(dim=1) - wanted.squeeze(1)
