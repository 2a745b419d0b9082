"""Chooses one of three attention paths for a model, and builds its masks: dense, prompt by prompt, or FlexAttention's blocks.

All three are equal (tests/parity). attention.py is the definition, per_prompt.py the path on CPUs, flex.py the path on GPUs.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rec_dist.errors import UserError
from rec_dist.models.attention import attention_masks
from rec_dist.models.flex import FLEX, SMALLEST_HEAD, block_masks, padded_length
from rec_dist.models.per_prompt import PER_PROMPT, prompt_masks
from rec_dist.packing.packed_batch import PackedBatch

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from rec_dist.models.past_prompts import PastPrompts


def choose_attention(wanted: str, config: Any, *, device: str) -> str:
    """The attention implementation of transformers for `wanted`, which is model.attention: auto, flex, per_prompt or sdpa.

    sdpa: a dense mask, with eager attention if the model soft-caps its scores, which SDPA cannot. auto: the first of flex,
    per_prompt and sdpa that works for the model and the device. Raises UserError if flex or per_prompt cannot work.
    """
    dense = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    if wanted == "sdpa":
        return dense
    no_flex, no_per_prompt = _why_not_flex(config, device), _why_not_per_prompt(config)
    for name, fault in (("flex", no_flex), ("per_prompt", no_per_prompt)):
        if wanted == name and fault:
            raise UserError(f"model.attention={name} {fault}; set model.attention=auto or sdpa")
    if wanted != "per_prompt" and not no_flex:
        return FLEX
    return dense if no_per_prompt else PER_PROMPT


def _why_not_flex(config: Any, device: str) -> str | None:
    if not device.startswith("cuda"):
        return f"needs a CUDA device, and on {device} FlexAttention has no backward pass"
    if fault := _unsupported(config, "_supports_flex_attn"):
        return fault
    heads = int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if head < SMALLEST_HEAD:
        return f"needs attention heads of width {SMALLEST_HEAD} or more, and this model's have {head}"
    return None


def _why_not_per_prompt(config: Any) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):
        return "does not support this model's soft-capped scores"
    return _unsupported(config, "_supports_attention_backend")


def _unsupported(config: Any, flag: str) -> str | None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(model, flag, False):
        return None
    return f"is not supported by {getattr(model, '__name__', type(config).__name__)} in transformers"


def num_rows(batch: PackedBatch, base: Any) -> int:
    """Rows that the causal language model `base` runs for `batch`.

    FlexAttention pads to whole blocks; bfloat16 on a CPU, so that few lengths come.
    """
    return _padded(batch.num_tokens, base)


def _padded(num_tokens: int, base: Any) -> int:
    if base.config._attn_implementation == FLEX:
        return padded_length(num_tokens)
    weight = embedding_weight(base)
    if base.config._attn_implementation == PER_PROMPT and weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        return one_of_few(num_tokens)
    return num_tokens


def one_of_few(num_tokens: int) -> int:
    """`num_tokens` rounded up to one of 16 lengths between powers of two, a multiple of 16: at most 1/16 more for long batches.

    oneDNN compiles each product in bfloat16 for its shape and never drops all of it: 8 to 18 MB for a new length of a batch.

    >>> [one_of_few(length) for length in (5, 500, 513, 2049)]
    [16, 512, 544, 2176]
    """
    step = max(16, (1 << (num_tokens - 1).bit_length()) // 32)
    return -(-num_tokens // step) * step


def masks_for(batch: PackedBatch, config: Any, dtype: torch.dtype, past: "PastPrompts | None" = None) -> Any:
    """The attention_mask for the attention that `config` names. batch: padded to num_rows. past: rows that do not run."""
    if config._attn_implementation == FLEX:
        assert past is None, "block masks have as many queries as keys"
        return block_masks(batch, config)
    if config._attn_implementation == PER_PROMPT:
        return prompt_masks(batch, config, dtype, None if past is None else past.num_kept)
    return attention_masks(batch, config, dtype, None if past is None else past.rows)


def base_of(model: nn.Module) -> Any:
    """The causal language model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def embedding_weight(base: Any) -> nn.Parameter:
    """The weight of the input embedding, for its dtype and its device. ZeRO stage 3 keeps what is read as an attribute in a forward
    pass gathered for the whole of it; this reads it as an iteration does.
    """
    named = base.get_input_embeddings().named_parameters()
    weight: nn.Parameter = next(weight for name, weight in named if name.rpartition(".")[2] == "weight")
    return weight


def run_decoder(base: Any, batch: PackedBatch, past: "PastPrompts | None" = None) -> Tensor:
    """The hidden states before the head of the causal language model `base`: (>= T, D), padding rows last.

    past: rows that need not run; they are 0.
    """
    num_run = batch.num_tokens if past is None else len(past.rows)
    missing = _padded(num_run, base) - num_run
    padded = batch.padded_to(batch.num_tokens + missing, joined=base.config._attn_implementation == PER_PROMPT)
    dtype = embedding_weight(base).dtype
    if past is None:
        masks = masks_for(padded, base.config, dtype)
        ids, positions, cache = padded.input_ids, padded.positions, None
    else:
        past = past.padded(batch.num_tokens, missing)
        rows = torch.from_numpy(past.rows).to(padded.input_ids.device)
        masks = masks_for(padded, base.config, dtype, past)
        ids, positions = padded.input_ids[rows], padded.positions[rows]
        cache = past.cache(base.config.num_hidden_layers, rows, padded.num_tokens)
    output = base.base_model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=masks,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    states: Tensor = output.last_hidden_state[0]
    if past is None:
        return states
    return states.new_zeros(padded.num_tokens, states.shape[1]).index_copy_(0, rows, states)
