"""Attention one prompt at a time: the path on CPUs, and where FlexAttention cannot go. Equal to `visible` in models/attention.py.

Why: through the dense mask every row of a micro-batch of U prompts visits all T rows of the micro-batch. Here it visits its own prompt and the
completions on it, T / U rows, and a prompt alone is plain causal attention, for which SDPA needs no mask at all. Cost: at most two calls
of SDPA a prompt and layer, about 0.1 ms each on a CPU beside the work itself. Prompts of about the same length share a call: on CPUs
the backward pass deals whole heads to threads, and 9 heads on 2 threads leave one idle for a tenth of the time (docs/adr/0011).

A prompt's rows and those of its completions stand next to each other in a batch, so all are slices. P rows of a prompt, B of its completions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from rec_dist.models.attention import for_layers, visible_rows
from rec_dist.packing.packed_batch import PackedBatch

PER_PROMPT = "rec_dist_per_prompt"  # as it is registered with transformers
_LARGEST_WASTE = 1.05  # of a shared call: scores of the padded prompts over those of the prompts


class PromptMasks(BlockMask):
    """What each prompt's rows may see. A BlockMask in name alone: with a dense (1, 1, T, T), all that transformers hands on unread."""

    ndim = 4  # asked for by GPT-2

    def __init__(self, sizes: list[tuple[int, int]], prompts: list[Tensor | None], branches: list[Tensor]) -> None:
        self.sizes = sizes  # (P, B) of each prompt
        self.prompts = prompts  # (P, P) added to its scores, or None for plain causal attention
        self.branches = branches  # (B, P + B) added to the scores of its completion rows
        self.calls = shared_calls([size for size, _ in sizes], [mask is None for mask in prompts])

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, 1, T, T), as of the mask that it stands for."""
        length = sum(prompt + branches for prompt, branches in self.sizes)
        return (1, 1, length, length)


def prompt_masks(batch: PackedBatch, config: Any, dtype: torch.dtype) -> Any:
    """The masks a transformers decoder takes under PER_PROMPT, made once a forward pass: one, or one for each kind of layer."""
    return for_layers(config, lambda window: _masks(batch, window, dtype))


def _masks(batch: PackedBatch, window: int | None, dtype: torch.dtype) -> PromptMasks:
    whole = torch.unique_consecutive(batch.prompt_ids, return_counts=True)[1]
    completion_rows = torch.zeros_like(whole).index_add_(
        0,
        torch.repeat_interleave(torch.arange(len(whole), device=whole.device), whole),
        (batch.completion_ids >= 0).to(whole.dtype),
    )
    sizes = [(rows - branches, branches) for rows, branches in zip(whole.tolist(), completion_rows.tolist(), strict=True)]
    prompts: list[Tensor | None] = []
    branches, start = [], 0
    for prompt, branch in sizes:
        end = start + prompt + branch
        windowed = window is not None and prompt > window
        prompts.append(
            _added(batch, slice(start, start + prompt), slice(start, start + prompt), window, dtype) if windowed else None
        )
        branches.append(_added(batch, slice(start + prompt, end), slice(start, end), window, dtype))
        start = end
    return PromptMasks(sizes, prompts, branches)


def shared_calls(lengths: list[int], causal: list[bool]) -> list[list[int]]:
    """Which prompts go in one call, longest first; lengths, causal (U,). One that is not plainly causal goes alone.

    The cost of a call of n prompts is n times that of its longest; it may be 1.05 times the sum of theirs.

    >>> shared_calls([100, 200, 99, 98, 50], [True, True, True, True, False])
    [[1], [0, 2, 3], [4]]
    """
    calls: list[list[int]] = []
    longest = own = 0
    for number in sorted((n for n, plain in enumerate(causal) if plain), key=lambda n: -lengths[n]):
        size = lengths[number] ** 2
        if calls and longest * (len(calls[-1]) + 1) <= _LARGEST_WASTE * (own + size):
            calls[-1].append(number)
            own += size
        else:
            calls.append([number])
            longest = own = size
    return calls + [[number] for number, plain in enumerate(causal) if not plain]


def _added(batch: PackedBatch, rows: slice, columns: slice, window: int | None, dtype: torch.dtype) -> Tensor:
    """(rows, columns): 0 where a row sees a column, else minus infinity. A row always sees itself."""
    seen = visible_rows(batch, rows, columns, window=window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def per_prompt_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """As transformers calls it. query (1, H, T, D), key and value (1, H / n, T, D) -> (1, T, H, D)."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if not isinstance(attention_mask, PromptMasks):  # called without a batch: generation, or a mask made elsewhere
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    shared = query.shape[1] // key.shape[1]
    grouped = shared > 1 and query.device.type == "cpu"  # on CUDA a mask and shared keys together leave the fast kernels
    if shared > 1 and not grouped:
        key, value = repeat_kv(key, shared), repeat_kv(value, shared)
    sizes = attention_mask.sizes
    # split, not slices: the gradient of a slice is a tensor of zeros as long as the batch.
    queries = torch.split(query, [size for pair in sizes for size in pair], dim=2)
    keys, values = (torch.split(whole, [sum(pair) for pair in sizes], dim=2) for whole in (key, value))
    scale = options.get("scaling")
    outputs = list(queries)  # to be replaced, but for the empty ones of prompts without completions
    owns = [
        [torch.split(part, list(pair), dim=2)[0] for part, pair in zip(whole, sizes, strict=True)] for whole in (keys, values)
    ]
    for call in attention_mask.calls:
        parts = [[queries[2 * number] for number in call], *([own[number] for number in call] for own in owns)]
        q, k, v = (_stack(part) for part in parts)
        answers = _attend(q, k, v, attention_mask.prompts[call[0]], scale, grouped)
        for number, answer in zip(call, torch.split(answers, 1), strict=True):
            outputs[2 * number] = answer if answer.shape[2] == sizes[number][0] else answer[:, :, : sizes[number][0]]
    for number, (_, branch) in enumerate(sizes):
        if branch:
            outputs[2 * number + 1] = _attend(
                queries[2 * number + 1], keys[number], values[number], attention_mask.branches[number], scale, grouped
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _stack(parts: list[Tensor]) -> Tensor:
    """(1, H, P_i, D) each -> (n, H, max P, D), zeros behind the shorter ones: causal rows before them never see those."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[2] for part in parts)
    return torch.cat([part if part.shape[2] == longest else F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, grouped: bool) -> Tensor:
    """SDPA; without a mask, plain causal attention."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def register() -> None:
    """Makes PER_PROMPT known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PER_PROMPT, per_prompt_attention)
    AttentionMaskInterface.register(PER_PROMPT, sdpa_mask)
