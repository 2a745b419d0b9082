"""The softmax over items: a vector for the history, the vectors of the items, and learnt terms, a chunk of logits at a time.

    v_m = (h_m - mean) @ whitening                    the state of the last title, as the vectors of the items were made
    u_m = n(v_m + P v_m + b) exp(a / t),  n(x) = x / |x|         P and b train and start at 0
    z_mi = (<u_m, e_i> + w_r(m,i) + w_pop log(1 + n_i)) / t
    loss_m = -log softmax_i(z_m)[target_m]

a starts at 0 and trains if the temperature of the cosines is learnt: it is t exp(-a / t).
r(m, i) is how item i stands to the history: its last item, another item of it, or neither (no term); n_i are training counts. A
title resembles itself most, and few data sets repeat items. Without a weight for the last item, the encoder itself would have to
learn to push it down, and that would pass for what it knows about the others. w_pop starts at t, so that log popularity has the
weight 1 in the logits, as it has in the model that knows nothing else.

Cost a target: I * W multiply-adds forward, three times as many with its backward pass and recomputation; 4 bytes for each logit
of one chunk. Item vectors are constants, so nothing of the size of the catalogue has a gradient.

M targets, D width of the model, W width of the item vectors, I items, C columns: I, or S drawn negatives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rec_dist.methods.retrieval.batch import LAST, SEEN, Chunk, RetrievalBatch
from rec_dist.models.encoder import Encoder
from rec_dist.packing.pooled_prompts import PooledPrompts

METRIC_NAMES = ("terms/last", "terms/seen", "terms/popularity", "temperature")


class ItemTable(nn.Module):
    """What the item vectors are, and how a state becomes comparable with them; all float32, also in a bfloat16 run.

    vectors (I, W), each of length 1; mean (D,); whitening (D, W); log_counts (I,) of log(1 + training count). None is a parameter
    or a buffer, so the engine leaves their dtype as it is. changing_buffers: `vectors` where they change while training.
    """

    def __init__(self, vectors: Tensor, mean: Tensor, whitening: Tensor, log_counts: Tensor) -> None:
        super().__init__()
        self.vectors, self.mean, self.whitening, self.log_counts = vectors, mean, whitening, log_counts
        self.changing_buffers: tuple[str, ...] = ()

    def on(self, device: torch.device | str) -> "ItemTable":
        """The same on `device`."""
        return ItemTable(*(tensor.to(device) for tensor in (self.vectors, self.mean, self.whitening, self.log_counts)))


@dataclass(frozen=True)
class Terms:
    """The learnt weights as tensors without a name in the module, in the units of a cosine: () each."""

    seen: Tensor
    last: Tensor
    popularity: Tensor

    def of(self, relation: Tensor) -> Tensor:
        """The term of each UNSEEN, SEEN or LAST item, in the shape of `relation`."""
        nothing = torch.zeros_like(self.seen)
        return torch.where(relation == LAST, self.last, torch.where(relation == SEEN, self.seen, nothing))


class HistoryProjection(nn.Module):
    """u of a state. It starts as n(v), which compares a title in its context with titles alone.

    sharpness: a, which trains if learns_temperature. It is divided by the temperature like the terms, so that it moves as fast.
    """

    def __init__(self, width: int, temperature: float, *, learns_temperature: bool) -> None:
        super().__init__()
        self.temperature = temperature
        self.sharpness = nn.Parameter(torch.zeros(1), requires_grad=learns_temperature)
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor, table: ItemTable) -> Tensor:
        """states (M, D) -> (M, W), each of length exp(a / t), in the dtype of the states."""
        whitened = (states - table.mean.to(states.dtype)) @ table.whitening.to(states.dtype)
        users = F.normalize(whitened + self.linear(whitened.to(self.linear.weight.dtype)).to(states.dtype), dim=1)
        return users * (self.sharpness / self.temperature).exp().to(states.dtype)


class LearntTerms(nn.Module):
    """w_seen, w_last and w_pop. Only forward() reads them, since ZeRO-3 gathers them there. trains: false leaves all at 0."""

    def __init__(self, temperature: float, *, trains: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 0.0, temperature if trains else 0.0]), requires_grad=trains)

    def forward(self, like: Tensor) -> Terms:
        """The weights in the dtype of `like`."""
        return Terms(*(self.weight.to(like.dtype) + 0.0).unbind())


class RetrievalHead(nn.Module):
    """The module that trains: an encoder, a projection and terms, and their loss. `table` is set before the first loss."""

    def __init__(
        self, encoder: Encoder, width: int, *, temperature: float, learns_terms: bool, learns_temperature: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = HistoryProjection(width, temperature, learns_temperature=learns_temperature)
        self.terms = LearntTerms(temperature, trains=learns_terms)
        self.temperature = temperature
        self.table: ItemTable | None = None

    def num_rows(self, batch: RetrievalBatch | PooledPrompts) -> int:
        """As Encoder.num_rows."""
        return self.encoder.num_rows(batch if isinstance(batch, PooledPrompts) else batch.prompts)

    def forward(self, batch: RetrievalBatch | PooledPrompts) -> tuple[Tensor, Tensor, Tensor]:
        """-> (loss_sum (), sums (2 + S,) = loss, count and each metric, log-probs (M,) in nats); only the first has a graph.

        Prompts without targets have no loss; the last result is then their states (U, D).
        """
        if isinstance(batch, PooledPrompts):
            states: Tensor = self.encoder(batch)
            return states.sum() * 0, states.new_zeros(2 + len(METRIC_NAMES), dtype=torch.float64), states.detach()
        assert self.table is not None, "the vectors of the items are not there yet"
        states = self.encoder(batch.prompts)  # (M, D)
        users, terms = self.project(states, self.table), self.terms(states)
        losses = softmax_losses(users, self.table, terms, batch, temperature=self.temperature)  # (M,)
        weights = batch.prompts.weights
        loss_sum, count = (losses.masked_fill(weights == 0, 0.0) * weights).sum(), weights.sum()
        in_nats = [term.detach() / self.temperature * count for term in (terms.last, terms.seen, terms.popularity)]
        lengths = users.detach().norm(dim=1).mean()  # exp(a / t)
        numbers = [loss_sum.detach(), count, *in_nats, self.temperature / lengths * count]
        return loss_sum, torch.stack([number.double() for number in numbers]), -losses.detach()


def softmax_losses(users: Tensor, table: ItemTable, terms: Terms, batch: RetrievalBatch, *, temperature: float) -> Tensor:
    """-log softmax of each target, in nats: users (M, W) -> (M,). With several chunks, the backward pass computes each again.

    With negatives it is the estimate -z_t + log(exp(z_t) + sum_{j: n_j != t} exp(z_{n_j}) / (S q_{n_j})), as for sequential
    recommenders (methods/sequential/next_item.py).
    """
    dtype, sampled = users.dtype, len(batch.negatives) > 0
    vectors = table.vectors[batch.negatives] if sampled else table.vectors  # (C, W)
    counts = table.log_counts[batch.negatives] if sampled else table.log_counts  # (C,)
    bias = terms.popularity / temperature * counts.to(dtype) - (batch.log_expected.to(dtype) if sampled else 0.0)
    scaled, vectors = users / temperature, vectors.to(dtype)
    changes = terms.of(batch.pair_relation) / temperature  # (P,)
    wanted = scaled.new_empty(0)
    if sampled:
        own = table.vectors[batch.targets].to(dtype)
        term = terms.of(batch.target_relation) + terms.popularity * table.log_counts[batch.targets].to(dtype)
        wanted = (scaled * own).sum(dim=1) + term / temperature  # (M,)
    again = len(batch.chunks) > 1 and torch.is_grad_enabled()
    parts = []
    for chunk in batch.chunks:
        inputs = (scaled, vectors, bias, changes, wanted, batch, chunk)
        parts.append(
            checkpoint(_chunk_losses, *inputs, use_reentrant=False, preserve_rng_state=False) if again else _chunk_losses(*inputs)
        )
    return torch.cat(parts)


def _chunk_losses(
    scaled: Tensor, vectors: Tensor, bias: Tensor, changes: Tensor, wanted: Tensor, batch: RetrievalBatch, chunk: Chunk
) -> Tensor:
    """scaled (M, W), vectors (C, W), bias (C,), changes (P,), wanted (M,) or nothing -> losses of the rows of `chunk`."""
    rows, pairs = slice(chunk.first, chunk.last), slice(chunk.first_pair, chunk.last_pair)
    targets = batch.targets[rows].unsqueeze(1)  # (m, 1)
    logits = torch.addmm(bias, scaled[rows], vectors.T)  # (m, C)
    logits.index_put_((batch.pair_rows[pairs] - chunk.first, batch.pair_columns[pairs]), changes[pairs], accumulate=True)
    if not len(batch.negatives):
        return logits.logsumexp(dim=1) - logits.gather(1, targets).squeeze(1)
    others = logits.masked_fill(batch.negatives == targets, float("-inf"))
    own = wanted[rows].unsqueeze(1)
    return torch.cat([own, others], dim=1).logsumexp(dim=1) - own.squeeze(1)
