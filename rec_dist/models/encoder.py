"""A language model as a reader: each prompt becomes one state, and a linear layer may say something of it.

The head is not run, so the cost is that of the decoder. Which loss: a function handed in, as with the scorer.

U prompts, T rows, R pooled rows, D width, C outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rec_dist.models.attention_paths import base_of, num_rows, run_decoder
from rec_dist.models.probe import check_same, probe_tokens
from rec_dist.packing.pooled_prompts import PooledPrompts, pack_pooled_prompts

# (outputs (U, C) float32, prompts) -> (loss_sum () with its graph, count (), metric name -> sum ()).
PreferenceHeadLoss = Callable[[Tensor, PooledPrompts], tuple[Tensor, Tensor, dict[str, Tensor]]]


class Encoder(nn.Module):
    """model: a causal language model, with or without a PEFT adapter. max_tokens: as models.scorer.Scorer takes it."""

    def __init__(self, model: nn.Module, *, max_tokens: int = 0) -> None:
        super().__init__()
        self.model = model
        self._max_tokens = max_tokens
        self._base = [base_of(model)]  # in a list: a second registration would give every parameter a second name

    @property
    def base(self) -> Any:
        """The causal language model itself, without an adapter around it."""
        return self._base[0]

    @property
    def vocab_size(self) -> int:
        """V, as the model's configuration has it."""
        return int(self.base.config.vocab_size)

    def num_rows(self, prompts: PooledPrompts) -> int:
        """Rows that the model runs for `prompts`, padding included; there is some under FlexAttention alone."""
        return num_rows(prompts.batch, self.base.config, self._max_tokens)

    def forward(self, prompts: PooledPrompts) -> Tensor:
        """-> (U, D) float32: the mean of each prompt's pooled rows, behind the decoder's last norm."""
        hidden = run_decoder(self.base, prompts.batch, self._max_tokens)  # (>= T, D)
        pooled = hidden[prompts.rows].float()  # (R, D)
        sums = pooled.new_zeros(len(prompts.weights), pooled.shape[1]).index_add(0, prompts.owners, pooled)
        counts = torch.bincount(prompts.owners, minlength=len(prompts.weights))  # (U,)
        return sums / counts.unsqueeze(1)


class PreferenceHead(nn.Module):
    """An encoder and a linear layer on its states, which begins as `start` (C,) whatever the state: weights 0, that bias.

    A random layer first has to unlearn what it says of states that differ little: with SmolLM2-135M its first loss was three times
    that of one guess for all.
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


def check_alone(score: Callable[[PooledPrompts], Tensor], *, vocab_size: int, dtype: torch.dtype) -> None:
    """The state of a prompt that stands behind another one, and alone; UserError when they differ.

    score: prompts -> states (U, D), called twice on every rank; dtype: the model's. As models.scorer.check_branching: catches models whose
    attention drops the mask.
    """
    tokens = probe_tokens(vocab_size)
    before, prompt = tokens[40:53], tokens[:9]
    together, alone = score(pack_pooled_prompts([before, prompt], [1, 1]))[-1], score(pack_pooled_prompts([prompt], [1]))[-1]
    what = "what this model makes of a prompt changes"
    check_same(together, alone, dtype, what=what, when="another one stands before it")
