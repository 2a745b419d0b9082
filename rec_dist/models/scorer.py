"""The scorer, the module that DeepSpeed runs: it takes a packed batch and returns loss sums and completion log-probs.

The loss is inside, so that ZeRO's hooks see every parameter in one forward pass. The scorer serves every method, the
reference pass and evaluation; the method's loss is an argument.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rec_dist.errors import UserError
from rec_dist.models.attention_paths import base_of, num_rows, run_decoder
from rec_dist.models.flex import FLEX
from rec_dist.models.fused_layers import check_fused
from rec_dist.models.head import CompletionHead, Preference, replace_head
from rec_dist.models.probe import check_same, probe_tokens
from rec_dist.models.prompt_cache import PromptCache
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist.runtime.arrays import I32

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from rec_dist.models.past_prompts import PastPrompts

# (logps (N,), batch) -> (loss_sum () with its graph, count (), metric name -> sum ()).
LossFunction = Callable[[Tensor, PackedBatch], tuple[Tensor, Tensor, dict[str, Tensor]]]

POLICY_ADAPTER, REFERENCE_ADAPTER = "default", "reference"


class Scorer(nn.Module):
    """model: a causal language model, with or without a PEFT adapter. T rows, D width, N completions.

    preference: set if the head can compute `loss` itself; `loss` then only counts and measures.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        metric_names: tuple[str, ...],
        preference: Preference | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.preference = preference
        self.metric_names = metric_names
        self._base = [base_of(model)]  # in a list: a second registration would give every parameter a second name
        replace_head(self.base)

    @property
    def base(self) -> Any:
        """The causal language model itself, without an adapter around it."""
        return self._base[0]

    @property
    def vocab_size(self) -> int:
        """V, as the model's configuration has it."""
        return int(self.base.config.vocab_size)

    @property
    def input_embeddings(self) -> nn.Module:
        """The module that turns token ids into rows of width D."""
        module: nn.Module = self.base.get_input_embeddings()
        return module

    @property
    def head(self) -> CompletionHead:
        """The language-model head."""
        head: CompletionHead = self.base.get_output_embeddings()
        return head

    def num_rows(self, batch: PackedBatch) -> int:
        """Rows that the model runs for `batch`, including the padding of FlexAttention."""
        return num_rows(batch, self.base)

    def forward(self, batch: PackedBatch, past: "PastPrompts | None" = None) -> tuple[Tensor, Tensor, Tensor]:
        """-> (loss_sum (), sums (2 + S,) = loss, count and each metric without a graph, logps (N,) float32).

        past: rows that earlier passes have run, without a graph.
        """
        head, hidden = self.head, run_decoder(self.base, batch, past)  # (T, D)
        if self.preference is None:
            logps = head(hidden, batch)
            loss_sum, count, metrics = self.loss(logps, batch)
        else:
            loss_sum, logps = head(hidden, batch, self.preference)
            _, count, metrics = self.loss(logps, batch)  # N numbers without a graph: about 20 small kernel launches
        numbers = [loss_sum.detach(), count, *(metrics[name] for name in self.metric_names)]
        return loss_sum, torch.stack([number.double() for number in numbers]), logps

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the frozen copy of the run's initial adapter is active, or if there is none, no adapter."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        # We set private attributes because every public call of PEFT 0.21 (set_adapter, enable_adapters, disable_adapter) also
        # toggles requires_grad, and ZeRO's hooks take the set of training parameters as fixed.
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
    """Rows that `module` runs for `batch`: its tokens, and the padding of FlexAttention if it is a language model."""
    count: Callable[[Any], int] | None = getattr(module, "num_rows", None)
    return batch.num_tokens if count is None else count(batch)


def check_scorer(scorer: Scorer, score: Callable[[PackedBatch], Tensor], *, dtype: torch.dtype) -> None:
    """Raises UserError if the model of `scorer` ignores the mask, or its fused layers differ from transformers' own.

    score: batch -> (N,) log-probs, by `scorer` in its engine. dtype: the model's.
    """
    check_branching(score, vocab_size=scorer.vocab_size, dtype=dtype)
    check_fused(scorer, lambda: score(_probe_batch(probe_tokens(scorer.vocab_size))), dtype)


def check_branching(score: Callable[[PackedBatch], Tensor], *, vocab_size: int, dtype: torch.dtype) -> None:
    """Raises UserError if a completion's log-prob changes when it shares its prompt and another prompt precedes it.

    score: batch -> (N,) log-probs; it is called twice on every rank. dtype: the model's. Detects models whose attention
    ignores the mask.
    """
    tokens = probe_tokens(vocab_size)
    together = score(_probe_batch(tokens))[-1]
    alone = score(pack_prompts([_probe_prompt(tokens[:9], [tokens[30:35]])]))[-1]
    check_same(together, alone, dtype, what="this model's log-probs change", when="completions share a prompt")


def check_past(scorer: Scorer, score: Callable[[PackedBatch, PromptCache | None], Tensor], *, dtype: torch.dtype) -> None:
    """Raises UserError if log-probs change when the beginning of a prompt is taken from an earlier pass.

    score: batch, and where to keep its prompts -> (N,) log-probs, by `scorer`. dtype: the model's.
    """
    if scorer.base.config._attn_implementation == FLEX:
        raise UserError(
            "prompts cannot be kept under FlexAttention, whose masks have as many queries as keys; set model.attention=sdpa, or "
            "--prompt-cache-mib 0"
        )
    tokens, cache = probe_tokens(scorer.vocab_size), PromptCache(1 << 30)
    longer = pack_prompts([_probe_prompt(np.concatenate([tokens[:9], tokens[50:54]]), [tokens[20:24], tokens[30:35]])])
    expected = score(longer, None)
    score(_probe_batch(tokens), cache)
    what, when = "this model's log-probs change", "keys and values of prompts are kept"
    check_same(score(longer, cache), expected, dtype, what=what, when=when)


def _probe_batch(tokens: I32) -> PackedBatch:
    """Two prompts with one and two completions, N = 3; tokens (64,)."""
    before = _probe_prompt(tokens[40:46], [tokens[50:53]])
    return pack_prompts([before, _probe_prompt(tokens[:9], [tokens[20:24], tokens[30:35]])])


def _probe_prompt(prompt: Any, answers: list[Any]) -> GroupedPrompt:
    return GroupedPrompt(
        tokens=prompt,
        branch_points=np.asarray([len(prompt) - 1], dtype=np.int32),
        keys=np.zeros(1, dtype=np.int64),
        group_sizes=np.asarray([len(answers)], dtype=np.int32),
        completion_inputs=np.concatenate([answer[:-1] for answer in answers]),
        input_lengths=np.asarray([len(answer) - 1 for answer in answers], dtype=np.int32),
        lengths=np.asarray([len(answer) for answer in answers], dtype=np.int32),
        targets=np.concatenate(answers),
    )
