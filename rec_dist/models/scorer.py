"""The scorer: the module given to DeepSpeed. A grouped stream goes in, loss sums and completion log-probs come out.

The loss is inside, so that ZeRO's hooks see every parameter in one forward. It serves every method, the reference pass and
evaluation; which method is a function handed in.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rec_dist.models.attention_paths import base_of, num_rows, run_decoder
from rec_dist.models.head import Preference, replace_head
from rec_dist.models.probe import check_same, probe_tokens
from rec_dist.stream.grouped import GroupedStream, pack_trunks
from rec_dist.stream.trunk import Trunk

# (logps (N,), stream) -> (loss_sum () with its graph, count (), metric name -> sum ()).
LossFunction = Callable[[Tensor, GroupedStream], tuple[Tensor, Tensor, dict[str, Tensor]]]

POLICY_ADAPTER, REFERENCE_ADAPTER = "default", "reference"


class Scorer(nn.Module):
    """model: a causal language model, with or without a PEFT adapter. T rows, D width, N completions.

    preference: given where `loss` is one that the head can compute itself; `loss` then only counts and measures.
    tokens_per_pack: under FlexAttention every stream is padded to this many rows, so that one compilation serves all.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        metric_names: tuple[str, ...],
        preference: Preference | None = None,
        *,
        tokens_per_pack: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.preference = preference
        self.metric_names = metric_names
        base = base_of(model)
        replace_head(base)
        self._tokens_per_pack = tokens_per_pack
        self._base = [base]  # in a list: a second registration would give every parameter a second name

    def num_rows(self, stream: GroupedStream) -> int:
        """Rows that the model runs for `stream`, padding included; there is some under FlexAttention alone."""
        return num_rows(stream, self._base[0].config, self._tokens_per_pack)

    def forward(self, stream: GroupedStream) -> tuple[Tensor, Tensor, Tensor]:
        """-> (loss_sum (), sums (2 + S,) = loss, count and each metric without graph, logps (N,) float32)."""
        base = self._base[0]
        head, hidden = base.get_output_embeddings(), run_decoder(base, stream, self._tokens_per_pack)  # (T, D)
        if self.preference is None:
            logps = head(hidden, stream)
            loss_sum, count, metrics = self.loss(logps, stream)
        else:
            loss_sum, logps = head(hidden, stream, self.preference)
            _, count, metrics = self.loss(logps, stream)  # on N numbers without a graph: about 20 small launches
        numbers = [loss_sum.detach(), count, *(metrics[name] for name in self.metric_names)]
        return loss_sum, torch.stack([number.double() for number in numbers]), logps

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the adapter is off, or the frozen copy of where this run started is on.

        Flips the layers' switches alone: PEFT's own calls also toggle requires_grad, which ZeRO's hooks do not expect.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers: list[Any] = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        has_copy = REFERENCE_ADAPTER in getattr(self.model, "peft_config", {})
        for layer in layers:
            if has_copy:
                layer._active_adapter = [REFERENCE_ADAPTER]
            else:
                layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._active_adapter, layer._disable_adapters = [POLICY_ADAPTER], False


def rows_run(module: nn.Module, batch: Any) -> int:
    """Rows that `module` runs for `batch`: its tokens, and the padding of a language model under FlexAttention."""
    count: Callable[[Any], int] | None = getattr(module, "num_rows", None)
    return batch.num_tokens if count is None else count(batch)


def check_forks(score: Callable[[GroupedStream], Tensor], *, vocab_size: int, dtype: torch.dtype) -> None:
    """Scores a completion that has a neighbour on its prompt and another prompt before it, and then alone; UserError when they differ.

    score: stream -> (N,) log-probs, called twice on every rank; dtype: the model's. Catches models whose attention drops the mask.
    """
    tokens = probe_tokens(vocab_size)
    prompt, answer = tokens[:9], tokens[30:35]
    before = _probe_trunk(tokens[40:46], [tokens[50:53]])
    together = score(pack_trunks([before, _probe_trunk(prompt, [tokens[20:24], answer])]))[-1]
    alone = score(pack_trunks([_probe_trunk(prompt, [answer])]))[-1]
    check_same(together, alone, dtype, what="this model's log-probs change", when="completions share a prompt")


def _probe_trunk(prompt: Any, answers: list[Any]) -> Trunk:
    return Trunk(
        tokens=prompt,
        forks=np.asarray([len(prompt) - 1], dtype=np.int32),
        keys=np.zeros(1, dtype=np.int64),
        group_sizes=np.asarray([len(answers)], dtype=np.int32),
        branch_tokens=np.concatenate([answer[:-1] for answer in answers]),
        branch_lengths=np.asarray([len(answer) - 1 for answer in answers], dtype=np.int32),
        lengths=np.asarray([len(answer) for answer in answers], dtype=np.int32),
        targets=np.concatenate(answers),
    )
