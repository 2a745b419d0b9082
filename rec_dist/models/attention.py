"""Who sees whom in a grouped stream, as a dense mask: the oracle, and the path on CPUs.

A trunk row sees its trunk up to itself. A branch row sees its trunk up to the fork, and its own branch up to itself. Nothing else.
Cost: T * T bytes as bool, shared by all layers; 64 MB at T = 8k.
"""

from typing import Any

import torch
from torch import Tensor

from rec_dist.runtime.errors import UserError
from rec_dist.stream.grouped import GroupedStream

# Transforms of the logits between the head's GEMM and the softmax that the scorer does not know: refused instead of ignored.
_UNKNOWN_LOGIT_TRANSFORMS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")


def visible(stream: GroupedStream, *, window: int | None = None) -> Tensor:
    """(T, T) bool: entry [q, k] says whether row q attends to row k. window: sliding attention's reach in positions."""
    same_trunk = stream.trunk_ids[:, None] == stream.trunk_ids[None, :]
    in_trunk = (stream.branch_ids[None, :] < 0) & (stream.positions[None, :] <= stream.limits[:, None])
    same_branch = (stream.branch_ids[:, None] == stream.branch_ids[None, :]) & (stream.branch_ids[:, None] >= 0)
    in_branch = same_branch & (stream.positions[None, :] <= stream.positions[:, None])
    mask = same_trunk & (in_trunk | in_branch)
    if window is not None:
        mask &= stream.positions[:, None] - stream.positions[None, :] < window
    return mask


def attention_masks(stream: GroupedStream, config: Any, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The masks a transformers decoder takes: one (1, 1, T, T), or one for each kind of layer where some slide.

    bool for SDPA; additive in `dtype` for eager attention, which adds what it is given.
    """
    additive = config._attn_implementation == "eager"

    def shaped(mask: Tensor) -> Tensor:
        if additive:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask[None, None]

    layer_types = set(getattr(config, "layer_types", None) or ())
    if not layer_types:  # one window for all layers (Mistral, Phi-3), or none
        return shaped(visible(stream, window=getattr(config, "sliding_window", None)))
    full = shaped(visible(stream))
    masks = {"full_attention": full}
    if "sliding_attention" in layer_types:
        masks["sliding_attention"] = shaped(visible(stream, window=int(config.sliding_window)))
    return masks


def check_architecture(model: Any) -> None:
    """Raises UserError for a model that cannot take the mask. What only behaviour shows is left to models.scorer.check_forks."""
    config, kind = model.config, type(model).__name__
    fault = None
    if getattr(config, "is_encoder_decoder", False):
        fault = "is an encoder-decoder"
    elif getattr(model, "_is_stateful", False):
        fault = "carries a recurrent state, which cannot branch"
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
