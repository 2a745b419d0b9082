"""Which rows see each other in a packed batch, as a dense mask. The faster paths, per_prompt.py and flex.py, must equal it.

A prompt row sees its prompt up to itself. A completion row sees its prompt up to the branch point, and its own completion up to
itself. No row sees anything else. Cost: T * T bytes as bool, shared by all layers; 64 MB at T = 8k.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist.runtime.arrays import I64

Mask = TypeVar("Mask")  # a dense mask, or a BlockMask
Rows = slice | Tensor  # of a batch; a tensor holds their numbers

# Transforms between the head's GEMM and the softmax that the scorer does not apply. Models that use them are refused.
_UNKNOWN_LOGIT_TRANSFORMS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")


def visible(batch: PackedBatch, *, window: int | None = None) -> Tensor:
    """(T, T) bool: entry [q, k] is true if row q attends to row k. window: reach of sliding attention in positions."""
    return visible_rows(batch, slice(None), slice(None), window=window)


def visible_rows(batch: PackedBatch, rows: Rows, columns: slice, *, window: int | None) -> Tensor:
    """visible(batch)[rows, columns], without computing the rest."""
    prompts, completions, positions = batch.prompt_ids[rows, None], batch.completion_ids[rows, None], batch.positions[rows, None]
    key_completions, key_positions = batch.completion_ids[None, columns], batch.positions[None, columns]
    in_prompt = (key_completions < 0) & (key_positions <= batch.limits[rows, None])
    in_completion = (completions >= 0) & (completions == key_completions) & (key_positions <= positions)
    mask = (prompts == batch.prompt_ids[None, columns]) & (in_prompt | in_completion)
    if window is not None:
        mask &= positions - key_positions < window
    return mask


def attention_masks(batch: PackedBatch, config: Any, dtype: torch.dtype, rows: I64 | None = None) -> Tensor | dict[str, Tensor]:
    """The dense masks a transformers decoder takes: one (1, 1, R, T), or one for each kind of layer if some slide.

    bool for SDPA; additive in `dtype` for eager attention, which adds its mask to the scores. rows (R,): those that run, None: all.
    """
    queries: Rows = slice(None) if rows is None else torch.from_numpy(rows).to(batch.input_ids.device)
    return for_layers(config, lambda window: dense_mask(visible_rows(batch, queries, slice(None), window=window), config, dtype))


def dense_mask(seen: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """seen (rows, columns) bool -> (1, 1, rows, columns) as the attention that `config` names takes it."""
    if config._attn_implementation == "eager":
        seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return seen[None, None]


def for_layers(config: Any, make: Callable[[int | None], Mask]) -> Mask | dict[str, Mask]:
    """make(window) once for all layers, or once for each kind of layer if the model has several."""
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not layer_types:  # one window for all layers (Mistral, Phi-3), or none
        return make(getattr(config, "sliding_window", None))
    masks = {"full_attention": make(None)}
    if "sliding_attention" in layer_types:
        masks["sliding_attention"] = make(int(config.sliding_window))
    return masks


def why_unsupported(model: Any) -> str | None:
    """Why this model cannot take the mask, as the end of the sentence "a MambaForCausalLM, which ..."; None if it can.

    Faults that only a forward pass shows are left to models.scorer.check_branching.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    if getattr(model, "_is_stateful", False):
        return "carries a recurrent state, which completions cannot share"
    if not getattr(model, "_supports_sdpa", False) and config._attn_implementation != "eager":
        return "has an attention that takes no custom mask"
    if getattr(config, "alibi", False) or hasattr(model.base_model, "build_alibi_tensor"):
        return "measures distances in rows instead of positions (ALiBi)"
    if model.get_output_embeddings() is None:
        return "has no language-model head"
    if unknown := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"has layers of kind {sorted(unknown)}, for which there is no mask"
    if scaled := [name for name in _UNKNOWN_LOGIT_TRANSFORMS if getattr(config, name, 1.0) not in (None, 1.0)]:
        return f"scales its logits ({scaled[0]}), which the head does not do"
    return None


def check_architecture(model: Any) -> None:
    """Raises UserError if `model` cannot take the mask."""
    if fault := why_unsupported(model):
        kind = type(model).__name__
        raise UserError(f"model.path names a {kind}, which {fault}; choose a decoder such as Llama, Qwen, Gemma or GPT-2")
