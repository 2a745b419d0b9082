"""A language-model head that computes completion log-probs or a preference loss without the (T, V) logits.

Why a module: under ZeRO-3 a weight is whole only inside the forward pass of the module that owns it, tied or not; elsewhere
it is an empty shard. Called with hidden states alone it is the plain head, so generation still works.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from rec_dist.packing.packed_batch import PackedBatch
from rec_dist_kernels import PreferenceKind, allowed_logps, completion_logps, preference_head


class Preference(NamedTuple):
    """A preference loss that the head computes while it has the logits. On a GPU this saves a step one GEMM of V * D."""

    kind: PreferenceKind
    beta: float


class CompletionHead(nn.Module):
    """Replaces `lm_head` and keeps its parameter names, so that saved weights are unchanged."""

    def __init__(self, lm_head: nn.Module, softcap: float | None) -> None:
        super().__init__()
        self.weight: nn.Parameter = lm_head.weight  # type: ignore[assignment]  # (V, D)
        self.bias: nn.Parameter | None = getattr(lm_head, "bias", None)  # (V,)
        self.softcap = softcap

    def forward(
        self, hidden: Tensor, batch: PackedBatch | None = None, preference: Preference | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden (T, D) and batch -> (N,) float32 summed log-probs; with a preference (loss_sum (), log-probs without a graph).

        The log-probs are those within batch.allowed, if the batch has it and there is no preference.

        hidden (..., D) alone -> (..., V) logits.
        """
        if batch is None:
            return F.linear(hidden, self.weight, self.bias)
        if preference is not None:
            return self._preference(hidden, batch, preference)
        if batch.allowed is not None:
            return allowed_logps(hidden, self.weight, batch.allowed, bias=self.bias, softcap=self.softcap)
        return completion_logps(
            hidden,
            self.weight,
            batch.rows,
            batch.targets,
            batch.completion_offsets,
            bias=self.bias,
            softcap=self.softcap,
            plan=batch.plan,
        )

    def _preference(self, hidden: Tensor, batch: PackedBatch, preference: Preference) -> tuple[Tensor, Tensor]:
        return preference_head(
            hidden,
            self.weight,
            batch.rows,
            batch.targets,
            batch.completion_offsets,
            batch.reference_logps,
            batch.group_offsets,
            kind=preference.kind,
            beta=preference.beta,
            bias=self.bias,
            softcap=self.softcap,
            margins=batch.margins,
            group_weights=batch.weights,
            plan=batch.plan,
        )


def replace_head(model: Any) -> CompletionHead:
    """Replaces the output embeddings of a causal language model with a CompletionHead, and returns that."""
    head = CompletionHead(model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None))
    model.set_output_embeddings(head)
    return head
