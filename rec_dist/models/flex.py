"""Who sees whom in a grouped packed, for FlexAttention: the path on GPUs. Equal to `visible` in models/attention.py, the oracle.

Why: the dense mask costs T * T bytes, and attention through it visits every pair of rows. A block mask names the 128 x 128 blocks
that hold a visible pair; the kernel visits those alone. Cost: one pass over T * T booleans a forward pass, 1,024 rows at a time.

Every packed is padded to one length, since a new length compiles the kernel again (about 15 s on a GPU).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rec_dist.models.attention import for_layers, visible_rows
from rec_dist.packing.packed_batch import PackedBatch

BLOCK = 128  # rows and columns of a block
FLEX = "flex_attention"  # as transformers names it
SMALLEST_HEAD = 16  # its GPU kernels take no narrower head
_ROWS_AT_ONCE = 8 * BLOCK
COMPILATIONS = 32  # of one function, before torch.compile gives up and runs it uncompiled: torch's own limit is 8


def padded_length(num_tokens: int, max_tokens: int) -> int:
    """Rows that a packed of num_tokens is run with: max_tokens in whole blocks; more only for a packed beyond that."""
    return -(-max(num_tokens, max_tokens) // BLOCK) * BLOCK


def block_masks(packed: PackedBatch, config: Any) -> Any:
    """The block masks a transformers decoder takes, made once a forward pass: one, or one for each kind of layer."""
    return for_layers(config, lambda window: block_mask(packed, window=window))


def block_mask(packed: PackedBatch, *, window: int | None = None) -> Any:
    """A BlockMask of (1, 1, T, T) for a packed of T rows, T a multiple of 128. window: sliding attention's reach in positions."""
    from torch.nn.attention.flex_attention import BlockMask

    # A mask made under inference_mode cannot be saved for the backward pass of a later step that meets the same compiled code.
    assert not torch.is_inference_mode_enabled(), "a BlockMask is never made under inference_mode"
    assert packed.num_tokens % BLOCK == 0, "pad the packed first"
    blocks = packed.num_tokens // BLOCK
    seen = []
    for first in range(0, packed.num_tokens, _ROWS_AT_ONCE):
        rows = visible_rows(packed, slice(first, first + _ROWS_AT_ONCE), slice(None), window=window)  # (C, T)
        seen.append(rows.view(-1, BLOCK, blocks, BLOCK).sum(dim=(1, 3)))  # visible pairs in each block
    pairs = torch.cat(seen)  # (blocks, blocks)
    whole = pairs == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_ordered((pairs > 0) & ~whole), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=mask_mod(packed, window=window)
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """chosen (Q, K) bool -> how many columns each row has (1, 1, Q) and their numbers, those first (1, 1, Q, K), int32."""
    columns = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None].contiguous()


def mask_mod(packed: PackedBatch, *, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(batch, head, q, k) -> whether row q attends to row k; the definition of `visible`, one pair at a time.

    int32, since the kernel gathers from these for every pair of a block that is not whole.
    """
    prompt_ids, completion_ids = packed.prompt_ids.int(), packed.completion_ids.int()
    positions, limits = packed.positions.int(), packed.limits.int()

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_prompt = (completion_ids[k] < 0) & (positions[k] <= limits[q])
        in_completion = (completion_ids[q] >= 0) & (completion_ids[k] == completion_ids[q]) & (positions[k] <= positions[q])
        seen = (prompt_ids[q] == prompt_ids[k]) & (in_prompt | in_completion)
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    return sees


def allow_compilations() -> None:
    """Lifts torch.compile's limit, above which it would run attention uncompiled without an error: passes with and without a
    graph, sliding and full layers, and the lengths of an evaluation are each a compilation."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(int(dynamo.recompile_limit), COMPILATIONS)


def num_compilations() -> int:
    """Graphs that torch.compile has made in this process so far: a step after warm-up must not add to it."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
