"""The language-model head as a module of ours: completion log-probs without the (T, V) logits.

Why a module: under ZeRO-3 a weight is whole only inside the forward of the module that owns it, tied or not; read from
outside it is an empty shard. Called with hidden states alone it is the plain head, so generation still works.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rec_dist.stream.grouped import GroupedStream
from rec_dist_kernels import completion_logps


class CompletionHead(nn.Module):
    """Takes the place of `lm_head`; keeps its parameter names, so that saved weights look as before."""

    def __init__(self, lm_head: nn.Module, softcap: float | None) -> None:
        super().__init__()
        self.weight: nn.Parameter = lm_head.weight  # type: ignore[assignment]  # (V, D)
        self.bias: nn.Parameter | None = getattr(lm_head, "bias", None)  # (V,)
        self.softcap = softcap

    def forward(self, hidden: Tensor, stream: GroupedStream | None = None) -> Tensor:
        """hidden (T, D) with a stream -> (N,) float32 summed log-probs; hidden (..., D) alone -> (..., V) logits."""
        if stream is None:
            return F.linear(hidden, self.weight, self.bias)
        return completion_logps(
            hidden, self.weight, stream.rows, stream.targets, stream.completion_offsets, bias=self.bias, softcap=self.softcap
        )


def replace_head(model: Any) -> CompletionHead:
    """Puts a CompletionHead in the place of a causal language model's output embeddings and returns it."""
    head = CompletionHead(model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None))
    model.set_output_embeddings(head)
    return head
