"""Who sees whom in a packed batch, as a dense mask: the oracle of the faster paths, models/per_prompt.py and models/flex.py.

A prompt row sees its prompt up to itself. A completion row sees its prompt up to the completion point, and its own completion up to itself. Nothing else.
Cost: T * T bytes as bool, shared by all layers; 64 MB at T = 8k.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.packing.packed_batch import PackedBatch

Mask = TypeVar("Mask")  # a dense mask, or a BlockMask

# Transforms of the logits between the head's GEMM and the softmax that the scorer does not know: refused instead of ignored.
_UNKNOWN_LOGIT_TRANSFORMS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")


def visible(batch: PackedBatch, *, window: int | None = None) -> Tensor:
    """(T, T) bool: entry [q, k] says whether row q attends to row k. window: sliding attention's reach in positions."""
    return visible_rows(batch, slice(None), slice(None), window=window)


def visible_rows(batch: PackedBatch, rows: slice, columns: slice, *, window: int | None) -> Tensor:
    """visible(batch)[rows, columns], without making the rest."""
    prompts, branches, positions = batch.prompt_ids[rows, None], batch.completion_ids[rows, None], batch.positions[rows, None]
    completions_there, positions_there = batch.completion_ids[None, columns], batch.positions[None, columns]
    in_prompt = (completions_there < 0) & (positions_there <= batch.limits[rows, None])
    in_completion = (branches >= 0) & (branches == completions_there) & (positions_there <= positions)
    mask = (prompts == batch.prompt_ids[None, columns]) & (in_prompt | in_completion)
    if window is not None:
        mask &= positions - positions_there < window
    return mask


def attention_masks(batch: PackedBatch, config: Any, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The dense masks a transformers decoder takes: one (1, 1, T, T), or one for each kind of layer where some slide.

    bool for SDPA; additive in `dtype` for eager attention, which adds what it is given.
    """

    def make(window: int | None) -> Tensor:
        mask = visible(batch, window=window)
        if config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask[None, None]

    return for_layers(config, make)


def for_layers(config: Any, make: Callable[[int | None], Mask]) -> Mask | dict[str, Mask]:
    """make(window) once for all layers, or once for each kind of layer where a model has kinds."""
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not layer_types:  # one window for all layers (Mistral, Phi-3), or none
        return make(getattr(config, "sliding_window", None))
    masks = {"full_attention": make(None)}
    if "sliding_attention" in layer_types:
        masks["sliding_attention"] = make(int(config.sliding_window))
    return masks


def check_architecture(model: Any) -> None:
    """Raises UserError for a model that cannot take the mask. What only behaviour shows is left to models.scorer.check_branching."""
    config, kind = model.config, type(model).__name__
    fault = None
    if getattr(config, "is_encoder_decoder", False):
        fault = "is an encoder-decoder"
    elif getattr(model, "_is_stateful", False):
        fault = "carries a recurrent state, which cannot completion"
    elif not getattr(model, "_supports_sdpa", False) and config._attn_implementation != "eager":
        fault = "has an attention that takes no mask of ours"
    elif getattr(config, "alibi", False):
        fault = "measures distances in rows instead of positions (ALiBi)"
    elif model.get_output_embeddings() is None:
        fault = "has no language-model head"
    elif unknown := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        fault = f"has layers of kind {sorted(unknown)}, for which no mask is known"
    elif scaled := [name for name in _UNKNOWN_LOGIT_TRANSFORMS if getattr(config, name, 1.0) not in (None, 1.0)]:
        fault = f"scales its logits ({scaled[0]}), which the head does not do"
    if fault:
        raise UserError(f"model.path names a {kind}, which {fault}; choose a decoder such as Llama, Qwen, Gemma or GPT-2")
