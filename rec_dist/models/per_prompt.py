"""Attention one prompt at a time: the path on CPUs, and wherever FlexAttention does not work. It must equal `visible` in
attention.py.

Why: through the dense mask, every row of a micro-batch of U prompts visits all T rows. Here a row visits only its own prompt
and that prompt's completions, T / U rows. The prompt itself is plain causal attention, for which SDPA needs no mask. Cost: at
most two calls of SDPA a prompt and layer, each with about 0.1 ms of overhead on a CPU. Prompts of similar length share a
call: on CPUs the backward pass gives whole heads to threads, and 9 heads on 2 threads leave one thread idle for a tenth of
the time (docs/adr/0011).

In a batch, the rows of a prompt and of its completions are adjacent, so all are slices. P rows of a prompt, B rows of its
completions, T rows of the batch, R of them that run: all, but for rows of prompts whose keys and values are kept (past_prompts.py).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from rec_dist.models.attention import for_layers, visible_rows
from rec_dist.models.padded import Call, padded_calls, with_padded_backward
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist.runtime.arrays import I64

PER_PROMPT = "rec_dist_per_prompt"  # its name in transformers
_LARGEST_WASTE = 1.05  # of a shared call: attention scores with padding over those without


class PromptMasks(BlockMask):
    """What the rows of each prompt may see. Subclasses BlockMask so that transformers passes it through unchanged.

    The rows behind a kept beginning of a prompt run like rows of completions, with a mask of their own: after most of a prompt.
    """

    ndim = 4  # GPT-2 reads it

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        keys: list[int],
        prompts: list[Tensor | None],
        completions: list[Tensor],
        backward: list[Call] | None,
    ) -> None:
        self.sizes = sizes  # (P, B) of each prompt: rows that run, all of them in B if its beginning does not
        self.keys = keys  # P + B of each prompt, with those that do not run
        self.prompts = prompts  # (P, P) to add to its scores, or None for plain causal attention
        self.completions = completions  # (B, P + B) to add to the scores of its completion rows
        self.backward = backward  # for the backward pass, if it runs as plain matrix products
        self.calls = shared_calls([size for size, _ in sizes], [mask is None for mask in prompts])

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, 1, R, T), the shape of the equivalent dense mask."""
        return (1, 1, sum(prompt + completions for prompt, completions in self.sizes), sum(self.keys))


def has_padded_backward(dtype: torch.dtype, device: str) -> bool:
    """Whether the backward pass in `dtype` runs as plain matrix products (padded.py), for which CPUs have AMX.

    In float32 it takes 1.3 to 2 times as long as torch's own.
    """
    return dtype == torch.bfloat16 and device == "cpu"


def prompt_masks(batch: PackedBatch, config: Any, dtype: torch.dtype, num_kept: I64 | None = None) -> Any:
    """The masks of a transformers decoder under PER_PROMPT for one forward pass: one, or one for each kind of layer.

    num_kept (prompts,): leading rows of each prompt that do not run.
    """
    kept = [0] * len(batch.sizes) if num_kept is None else num_kept.tolist()
    return for_layers(config, lambda window: _masks(batch, kept, window, dtype))


def _masks(batch: PackedBatch, num_kept: list[int], window: int | None, dtype: torch.dtype) -> PromptMasks:
    prompts: list[Tensor | None] = []
    completions, sizes, keys, start = [], [], batch.sizes.sum(axis=1).tolist(), 0
    for (length, _), kept, rows in zip(batch.sizes.tolist(), num_kept, keys, strict=True):
        end, prompt = start + rows, 0 if kept else length  # rows that see their own prompt alone
        own = slice(start, start + prompt)
        prompts.append(_added(batch, own, own, window, dtype) if window is not None and prompt > window else None)
        completions.append(_added(batch, slice(start + kept + prompt, end), slice(start, end), window, dtype))
        sizes.append((prompt, rows - kept - prompt))
        start = end
    backward = None
    if torch.is_grad_enabled() and has_padded_backward(dtype, batch.input_ids.device.type):
        assert not any(num_kept), "rows that do not run have no gradient"
        shared = shared_calls(keys, [True] * len(keys))
        backward = padded_calls(keys, shared, lambda own: visible_rows(batch, own, own, window=window), dtype)
    return PromptMasks(sizes, keys, prompts, completions, backward)


def shared_calls(lengths: list[int], causal: list[bool]) -> list[list[int]]:
    """Which prompts share a call, longest first. lengths, causal: (U,). A prompt that is not plainly causal gets its own call, and
    one of length 0 none.

    A call of n prompts costs n times its longest prompt, which may be up to 1.05 times the sum of their own costs.

    >>> shared_calls([100, 200, 99, 98, 50], [True, True, True, True, False])
    [[1], [0, 2, 3], [4]]
    """
    calls: list[list[int]] = []
    longest = own = 0
    for number in sorted((n for n, plain in enumerate(causal) if plain and lengths[n]), key=lambda n: -lengths[n]):
        size = lengths[number] ** 2
        if calls and longest * (len(calls[-1]) + 1) <= _LARGEST_WASTE * (own + size):
            calls[-1].append(number)
            own += size
        else:
            calls.append([number])
            longest = own = size
    return calls + [[number] for number, plain in enumerate(causal) if not plain]


def _added(batch: PackedBatch, rows: slice, columns: slice, window: int | None, dtype: torch.dtype) -> Tensor:
    """(rows, columns): 0 if a row sees a column, else minus infinity. A row always sees itself."""
    seen = visible_rows(batch, rows, columns, window=window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def per_prompt_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers. query (1, H, R, D), key and value (1, H / n, T, D) -> (1, R, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, PromptMasks):  # no packed batch: generation, or another mask
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    forward = partial(_forward, masks=attention_mask, scale=scale)
    if attention_mask.backward is None:
        return forward(query, key, value), None
    return with_padded_backward(forward, query, key, value, attention_mask.backward, scale), None


def _forward(query: Tensor, key: Tensor, value: Tensor, masks: PromptMasks, scale: float) -> Tensor:
    """query (1, H, R, D), key and value (1, H / n, T, D) -> (1, R, H, D), with torch's attention."""
    from transformers.integrations.sdpa_attention import repeat_kv

    shared = query.shape[1] // key.shape[1]
    grouped = shared > 1 and query.device.type == "cpu"  # on CUDA the fast kernels do not take a mask with shared keys
    if shared > 1 and not grouped:
        key, value = repeat_kv(key, shared), repeat_kv(value, shared)
    sizes = masks.sizes
    # split rather than slices: the gradient of a slice is a tensor of zeros as long as the batch.
    queries = torch.split(query, [size for pair in sizes for size in pair], dim=2)
    keys, values = (torch.split(whole, masks.keys, dim=2) for whole in (key, value))
    outputs = list(queries)  # replaced below, except the empty parts of prompts without completions
    owns = [
        [torch.split(part, [own, part.shape[2] - own], dim=2)[0] for part, (own, _) in zip(whole, sizes, strict=True)]
        for whole in (keys, values)
    ]
    for call in masks.calls:
        parts = [[queries[2 * number] for number in call], *([own[number] for number in call] for own in owns)]
        q, k, v = (_stack(part) for part in parts)
        answers = _attend(q, k, v, masks.prompts[call[0]], scale, grouped)
        for number, answer in zip(call, torch.split(answers, 1), strict=True):
            outputs[2 * number] = answer if answer.shape[2] == sizes[number][0] else answer[:, :, : sizes[number][0]]
    for number, (_, completion) in enumerate(sizes):
        if completion:
            outputs[2 * number + 1] = _attend(
                queries[2 * number + 1], keys[number], values[number], masks.completions[number], scale, grouped
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _stack(parts: list[Tensor]) -> Tensor:
    """(1, H, P_i, D) each -> (n, H, max P, D), shorter ones padded with zeros, which no causal row before them sees."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[2] for part in parts)
    return torch.cat([part if part.shape[2] == longest else F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, grouped: bool) -> Tensor:
    """SDPA with the mask, or plain causal attention for None."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def register() -> None:
    """Registers PER_PROMPT with transformers. Repeated calls have no effect."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PER_PROMPT, per_prompt_attention)
    AttentionMaskInterface.register(PER_PROMPT, sdpa_mask)
