"""The masks of packed batches for FlexAttention, the path on GPUs. They must equal `visible` in models/attention.py.

Why: the dense mask costs T * T bytes, and attention visits every pair of rows through it. A block mask lists the 128 x 128
blocks with a visible pair, and the kernel visits only those. Cost: one pass over T * T booleans a forward pass, 1,024 rows at
a time.

Batches are padded to a multiple of 256 rows. torch compiles the kernel for the first length, once more for the second, with
lengths as variables, and never again (tests/parity/test_flex_compilations.py). Sizes of 0 and 1 are constants to it, so a
batch has at least two blocks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rec_dist.models.attention import for_layers, visible_rows
from rec_dist.packing.packed_batch import PackedBatch

BLOCK = 128  # rows and columns of a block
PADDING = 2 * BLOCK  # at most 255 rows in vain; the fewer lengths, the more the allocator finds again what it has freed
FLEX = "flex_attention"  # its name in transformers
SMALLEST_HEAD = 16  # the narrowest that its GPU kernels take
_ROWS_AT_ONCE = 8 * BLOCK
COMPILATIONS = 32  # of one function, after which torch.compile runs it uncompiled; torch's default is 8


def padded_length(num_tokens: int) -> int:
    """Rows that a batch of num_tokens >= 1 runs with: the next multiple of PADDING."""
    return -(-num_tokens // PADDING) * PADDING


def block_masks(batch: PackedBatch, config: Any) -> Any:
    """The block masks of a transformers decoder for one forward pass: one, or one for each kind of layer."""
    return for_layers(config, lambda window: block_mask(batch, window=window))


def block_mask(batch: PackedBatch, *, window: int | None = None) -> Any:
    """A BlockMask of (1, 1, T, T) for T rows, T a multiple of 128. window: reach of sliding attention in positions."""
    from torch.nn.attention.flex_attention import BlockMask

    # The backward pass of a later step that runs the same compiled code cannot save a mask made under inference_mode.
    assert not torch.is_inference_mode_enabled(), "do not make a BlockMask under inference_mode"
    assert batch.num_tokens % BLOCK == 0, "pad the batch first"
    blocks = batch.num_tokens // BLOCK
    seen = []
    for first in range(0, batch.num_tokens, _ROWS_AT_ONCE):
        rows = visible_rows(batch, slice(first, first + _ROWS_AT_ONCE), slice(None), window=window)  # (C, T)
        seen.append(rows.view(-1, BLOCK, blocks, BLOCK).sum(dim=(1, 3)))  # visible pairs in each block
    pairs = torch.cat(seen)  # (blocks, blocks)
    whole = pairs == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_ordered((pairs > 0) & ~whole), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=mask_mod(batch, window=window)
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """chosen (Q, K) bool -> the count of each row's columns (1, 1, Q), and the column numbers, chosen ones first (1, 1, Q,
    K); int32."""
    columns = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None].contiguous()


def mask_mod(batch: PackedBatch, *, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(batch, head, q, k) -> whether row q attends to row k: the definition of `visible` for one pair.

    int32, because the kernel gathers these values for every pair of a partly visible block.
    """
    prompt_ids, completion_ids = batch.prompt_ids.int(), batch.completion_ids.int()
    positions, limits = batch.positions.int(), batch.limits.int()

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_prompt = (completion_ids[k] < 0) & (positions[k] <= limits[q])
        in_completion = (completion_ids[q] >= 0) & (completion_ids[k] == completion_ids[q]) & (positions[k] <= positions[q])
        seen = (prompt_ids[q] == prompt_ids[k]) & (in_prompt | in_completion)
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    return sees


def allow_compilations() -> None:
    """Raises torch.compile's limit, beyond which attention would silently run uncompiled. Passes with and without a graph, sliding
    and full layers, and the first and the second length take one compilation each."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(int(dynamo.recompile_limit), COMPILATIONS)


def num_compilations() -> int:
    """Graphs that torch.compile has made in this process so far. A step after warm-up must not add any."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
