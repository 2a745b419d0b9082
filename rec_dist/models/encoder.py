"""A language model as an encoder: it pools rows of prompts into states, on which a linear layer may make predictions.

The language-model head does not run, so the cost is that of the decoder. The loss is an argument, as in the scorer.

U states (often one a prompt), T rows, R pooled rows, D width, C outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rec_dist.models.attention_paths import base_of, num_rows, run_decoder
from rec_dist.models.fused_layers import check_fused
from rec_dist.models.probe import check_same, probe_tokens
from rec_dist.packing.pooled_prompts import PooledPrompts, pack_pooled_prompts

# (outputs (U, C) float32, prompts) -> (loss_sum () with its graph, count (), metric name -> sum ()).
PreferenceHeadLoss = Callable[[Tensor, PooledPrompts], tuple[Tensor, Tensor, dict[str, Tensor]]]


class Encoder(nn.Module):
    """model: a causal language model, with or without a PEFT adapter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._base = [base_of(model)]  # in a list: a second registration would give every parameter a second name

    @property
    def base(self) -> Any:
        """The causal language model itself, without an adapter around it."""
        return self._base[0]

    @property
    def vocab_size(self) -> int:
        """V, from the model's configuration."""
        return int(self.base.config.vocab_size)

    def num_rows(self, prompts: PooledPrompts) -> int:
        """Rows that the model runs for `prompts`, including the padding of FlexAttention."""
        return num_rows(prompts.batch, self.base)

    def forward(self, prompts: PooledPrompts) -> Tensor:
        """-> (U, D) float32: the mean of each state's pooled rows, behind the decoder's last norm."""
        hidden = run_decoder(self.base, prompts.batch)  # (>= T, D)
        pooled = hidden[prompts.rows].float()  # (R, D)
        sums = pooled.new_zeros(len(prompts.weights), pooled.shape[1]).index_add(0, prompts.owners, pooled)
        return sums / prompts.counts.unsqueeze(1)


class PreferenceHead(nn.Module):
    """An encoder and a linear layer on its states. The layer starts with weights 0 and bias `start` (C,).

    States differ little at first, so a random layer would first have to unlearn: with SmolLM2-135M its first loss was three
    times that of a constant prediction.
    """

    def __init__(
        self, encoder: Encoder, start: Tensor, width: int, loss: PreferenceHeadLoss, metric_names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(width, len(start))
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(start)
        self.loss, self.metric_names = loss, metric_names

    def num_rows(self, prompts: PooledPrompts) -> int:
        """As Encoder.num_rows."""
        return self.encoder.num_rows(prompts)

    def forward(self, prompts: PooledPrompts) -> tuple[Tensor, Tensor, Tensor]:
        """-> (loss_sum (), sums (2 + S,) = loss, count and each metric, states (U, D) float32); only the first has a graph."""
        states = self.encoder(prompts)
        outputs = self.linear(states.to(self.linear.weight.dtype)).float()
        loss_sum, count, metrics = self.loss(outputs, prompts)
        numbers = [loss_sum.detach(), count, *(metrics[name] for name in self.metric_names)]
        return loss_sum, torch.stack([number.double() for number in numbers]), states.detach()


def check_encoder(encoder: Encoder, score: Callable[[PooledPrompts], Tensor], *, dtype: torch.dtype) -> None:
    """As models.scorer.check_scorer, for states. score: prompts -> states (U, D), by `encoder` in its engine."""
    check_alone(score, vocab_size=encoder.vocab_size, dtype=dtype)
    tokens = probe_tokens(encoder.vocab_size)
    check_fused(encoder, lambda: score(pack_pooled_prompts([tokens[40:53], tokens[:9]], [1, 1])), dtype)


def check_alone(score: Callable[[PooledPrompts], Tensor], *, vocab_size: int, dtype: torch.dtype) -> None:
    """Raises UserError if a prompt's state changes when another prompt precedes it in the batch.

    score: prompts -> states (U, D); it is called twice on every rank. dtype: the model's. As models.scorer.check_branching,
    it detects models whose attention ignores the mask.
    """
    tokens = probe_tokens(vocab_size)
    before, prompt = tokens[40:53], tokens[:9]
    together, alone = score(pack_pooled_prompts([before, prompt], [1, 1]))[-1], score(pack_pooled_prompts([prompt], [1]))[-1]
    what = "this model's state of a prompt changes"
    check_same(together, alone, dtype, what=what, when="another one stands before it")
