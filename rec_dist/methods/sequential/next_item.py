"""Next-item prediction with any sequential recommender: the loss that trains it, and its scores after a history.

A model encodes positions and scores items; loss, sampling and use of the scores are the same for all. Cost a scored row: I * D
multiply-adds and I floats of logits, or S * D and S with drawn negatives.

B sequences, T rows of all of them, M scored rows, S drawn negatives, h items of a teacher's list, I items of the catalogue, D width.
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
TEACHER_METRICS = ("loss/next_item", "loss/teacher")


class SequentialModel(Protocol):
    """A recommender. A row of encode() reads only the items of its sequence up to its own position."""

    def encode(self, batch: SequenceBatch) -> Tensor:
        """(T, D): the input of the softmax at every position."""
        ...

    def score(self, hidden: Tensor, items: Tensor | None = None) -> Tensor:
        """Rows of encode (M, D) -> logits (M, I), or of `items` (S,) for every row (M, S), or of `items` (M, h) of each (M, h)."""
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
    """The module that trains: a model and its loss. teacher_weight: of the teacher's lists in the loss, None without a teacher."""

    def __init__(self, model: SequentialModel, teacher_weight: float | None = None) -> None:
        super().__init__()
        self.model, self.teacher_weight = model, teacher_weight

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """-> (loss_sum (), sums (2,) = loss and count without graph, logps (M,) of the targets, in nats, without graph).

        With q the softmax of the logits over all items, or its estimate if the batch has negatives, and p a teacher's shares:

            CE_m = -log q_m[target_m]    KL_m = sum_j p_mj (log p_mj - log q_mj) over the list of m    a = teacher_weight
            loss_sum = sum_m w_m L_m,    L_m = (1 - a) CE_m + a KL_m where m has a list, else CE_m

        With a teacher, sums (4,) also has the sums of CE and KL.
        """
        hidden = self.model.encode(batch)[batch.rows]  # (M, D)
        cross_entropy, listed, log_norm = self._sampled(hidden, batch) if len(batch.negatives) else self._full(hidden, batch)
        losses, parts = cross_entropy, [batch.weights.sum()]
        if self.teacher_weight is not None:
            shares = batch.shares  # (M, h)
            weight = self.teacher_weight * (shares.sum(dim=1) > 0)  # (M,)
            divergence = torch.xlogy(shares, shares).sum(dim=1) - (shares * listed).sum(dim=1) + shares.sum(dim=1) * log_norm
            losses = (1 - weight) * cross_entropy + weight * divergence
            parts += [(values.detach() * batch.weights).sum() for values in (cross_entropy, divergence)]
        loss_sum = (losses * batch.weights).sum()
        sums = torch.stack([loss_sum.detach(), *parts]).double()
        return loss_sum, sums, -cross_entropy.detach()

    def _full(self, hidden: Tensor, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy (M,), logits of the lists (M, h), and the logarithm of the softmax's denominator (M,)."""
        logits = self.model.score(hidden)  # (M, I)
        cross_entropy = F.cross_entropy(logits, batch.targets, reduction="none")
        wanted = logits.gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        return cross_entropy, logits.gather(1, batch.listed), cross_entropy + wanted

    def _sampled(self, hidden: Tensor, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """As _full, with the denominator exp(l_t) + sum_{j: n_j != t} exp(l_{n_j}) / (S q_{n_j}), n_1..n_S drawn from q.

        The expectation of the sum is that of exp(l_i) over all i but t (importance sampling; Bengio & Senecal 2008 call it the
        logQ correction), so loss and gradient approach the full ones as S grows. At a finite S the log makes the loss too small.
        """
        wanted = self.model.score(hidden, batch.targets.unsqueeze(1))  # (M, 1)
        others = self.model.score(hidden, batch.negatives) - batch.log_expected  # (M, S)
        others = others.masked_fill(batch.negatives == batch.targets.unsqueeze(1), float("-inf"))
        log_norm = torch.cat([wanted, others], dim=1).logsumexp(dim=1)  # (M,)
        listed = wanted[:, :0] if self.teacher_weight is None else self.model.score(hidden, batch.listed)  # (M, h)
        return log_norm - wanted.squeeze(1), listed, log_norm
