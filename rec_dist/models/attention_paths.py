"""Which of the three attentions a model runs with, and the masks that it takes: dense, trunk by trunk, or FlexAttention's blocks.

All see the same (tests/parity). attention.py is the definition, trunkwise.py the path on CPUs, flex.py the one on GPUs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rec_dist.models.attention import attention_masks
from rec_dist.models.flex import FLEX, SMALLEST_HEAD, block_masks, padded_length
from rec_dist.models.trunkwise import TRUNKWISE, trunk_masks
from rec_dist.runtime.errors import UserError
from rec_dist.stream.grouped import GroupedStream


def choose_attention(wanted: str, config: Any, *, device: str) -> str:
    """The transformers implementation for model.attention = auto, flex, trunkwise or sdpa, a model's config and the worker's device.

    sdpa: a dense mask; eager instead where scores are soft-capped, which SDPA does not know. auto: the first of flex, trunkwise and
    sdpa that the model and the device take. Raises UserError for flex or trunkwise where it cannot work.
    """
    dense = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    if wanted == "sdpa":
        return dense
    no_flex, no_trunkwise = _why_not_flex(config, device), _why_not_trunkwise(config)
    for name, fault in (("flex", no_flex), ("trunkwise", no_trunkwise)):
        if wanted == name and fault:
            raise UserError(f"model.attention={name} {fault}; set model.attention=auto or sdpa")
    if wanted != "trunkwise" and not no_flex:
        return FLEX
    return dense if no_trunkwise else TRUNKWISE


def _why_not_flex(config: Any, device: str) -> str | None:
    if not device.startswith("cuda"):
        return f"needs a CUDA device and this worker runs on {device}, where FlexAttention has no backward pass"
    if fault := _unsupported(config, "_supports_flex_attn"):
        return fault
    heads = int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if head < SMALLEST_HEAD:
        return f"needs attention heads of {SMALLEST_HEAD} or wider and this model's have {head}"
    return None


def _why_not_trunkwise(config: Any) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):
        return "does not know this model's soft-capped scores"
    return _unsupported(config, "_supports_attention_backend")


def _unsupported(config: Any, flag: str) -> str | None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(model, flag, False):
        return None
    return f"is not supported by {getattr(model, '__name__', type(config).__name__)} in transformers"


def num_rows(stream: GroupedStream, config: Any, tokens_per_pack: int) -> int:
    """Rows that a model runs for `stream`: under FlexAttention it is padded, so that one compilation serves all."""
    if config._attn_implementation == FLEX:
        return padded_length(stream.num_tokens, tokens_per_pack)
    return stream.num_tokens


def masks_for(stream: GroupedStream, config: Any, dtype: torch.dtype) -> Any:
    """What the attention that `config` names takes as attention_mask. stream: padded to num_rows."""
    if config._attn_implementation == FLEX:
        return block_masks(stream, config)
    if config._attn_implementation == TRUNKWISE:
        return trunk_masks(stream, config, dtype)
    return attention_masks(stream, config, dtype)


def base_of(model: nn.Module) -> Any:
    """The causal language model itself, where `model` is one with a PEFT adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def run_decoder(base: Any, stream: GroupedStream, tokens_per_pack: int) -> Tensor:
    """What stands before the head of the causal language model `base` at every row, and at the padding behind them: (>= T, D)."""
    padded = stream.padded_to(num_rows(stream, base.config, tokens_per_pack))
    output = base.base_model(
        input_ids=padded.input_ids[None],
        position_ids=padded.positions[None],
        attention_mask=masks_for(padded, base.config, base.dtype),
        use_cache=False,
    )
    rows: Tensor = output.last_hidden_state[0]
    return rows
