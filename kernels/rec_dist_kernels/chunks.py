"""How the fused head is cut into chunks: which rows of logits are in memory together, their buffer, and their gradients.

Why: the logits of one chunk are the only large tensor, so the chunk size sets the head's memory, and a row
that several completions share (the branch point of a prompt) is multiplied once per chunk.
Cost: a plan takes two sorts of M integers on the CPU, 0.3 ms at M = 4,480 on one core. Made when the batch is packed,
it costs the device nothing; made in the call, for inputs on a device, the host waits for them once.

T rows of the batch, D width, V vocabulary, M scored tokens, N completions, G groups, U rows to multiply (each row once per
chunk), C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rec_dist_kernels.segments import segment_ids

# A matrix product is computed in tiles, on NVIDIA's 132 processors of 128 x 256 in bfloat16. d(hidden) of 1,046 rows at D = 4,096
# is 9 x 16 = 144 of them: two rounds, the second one nearly empty. 4,096 rows are 512 tiles, four rounds of which 97 % is used.
CHUNK_ROWS = 4096
# Of logits: what 4,096 rows need at V = 262,144 in bfloat16. Only a larger vocabulary, or float32 from V = 131,073 on, gets fewer.
CHUNK_BYTES = 2 << 30
_TILE_ROWS = 128  # C is a multiple of it, so that no tile is cut off
_ALIGNMENT = 64  # elements between the rows of a buffer: 128 bytes in bfloat16, so that any V loads 16 bytes at a time


class Chunk(NamedTuple):
    """Places first..last-1 of HeadPlan.rows, and the groups and completions they serve (none where these do not matter)."""

    first: int
    last: int
    groups: slice = slice(0)
    completions: slice = slice(0)


class HeadPlan(NamedTuple):
    """Which rows to multiply in which chunk. The row at place c of the U predicts the tokens order[starts[c]] .. order[starts[c+1]-1].

    A function of the batch alone, not of the head, so that it can be made when the batch is.
    """

    rows: Tensor  # (U,) rows of hidden; distinct within a chunk
    order: Tensor  # (M,) tokens by their place
    starts: Tensor  # (U+1,)
    chunks: tuple[Chunk, ...]
    chunk_rows: int  # most rows of a chunk of several groups

    @property
    def largest(self) -> int:
        """C of the largest chunk."""
        return max((chunk.last - chunk.first for chunk in self.chunks), default=0)

    def ranges(self, limit: int) -> list[tuple[int, int]]:
        """The places as ranges first..last-1 of at most `limit`, none across two chunks: the rows of each are distinct."""
        return [
            (first, min(first + limit, chunk.last)) for chunk in self.chunks for first in range(chunk.first, chunk.last, limit)
        ]

    def to(self, device: str | torch.device) -> "HeadPlan":
        """The same plan on `device`."""
        return self._replace(rows=self.rows.to(device), order=self.order.to(device), starts=self.starts.to(device))


def rows_of_chunk(vocabulary: int, item_bytes: int) -> int:
    """C for V = vocabulary words of item_bytes each: CHUNK_ROWS, or the multiple of 128 that CHUNK_BYTES hold, and at least 128.

    C * V * item_bytes of memory: 1.05 GB at V = 128,256 in bfloat16, at most 2.15 GB up to V = 8 million.

    >>> rows_of_chunk(128_256, 2), rows_of_chunk(152_064, 4), rows_of_chunk(50_000_000, 2)
    (4096, 3456, 128)
    """
    fitting = CHUNK_BYTES // (_padded(vocabulary) * item_bytes)
    return max(_TILE_ROWS, min(CHUNK_ROWS, fitting // _TILE_ROWS * _TILE_ROWS))


def plan_rows(rows: Tensor) -> HeadPlan:
    """rows (M,): each distinct row once, in one chunk without groups; on the device of rows."""
    ordered, order = rows.cpu().sort(stable=True)
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    size = distinct.shape[0]
    chunks = (Chunk(0, size),) if size else ()
    return HeadPlan(distinct, order, _starts(counts), chunks, size).to(rows.device)


def plan_groups(rows: Tensor, completion_offsets: Tensor, group_offsets: Tensor, *, chunk_rows: int = CHUNK_ROWS) -> HeadPlan:
    """The plan of a batch for completion_logps and preference_head: chunks of whole, consecutive groups.

    A chunk takes groups while their rows, each group's distinct ones, add up to at most chunk_rows, and at least
    one group: what a group needs to know about its completions is known when its chunk ends.

    Args:
        rows: (M,) int64, not negative; completion_offsets: (N+1,) from 0 to M; group_offsets: (G+1,) from 0 to N; as in
            preference_head.
        chunk_rows: C. A head whose vocabulary affords less (rows_of_chunk) plans for itself.

    Returns: the plan, on the device of rows. It is computed on the CPU: for inputs on a device the host waits for these once.
    """
    device, parts = rows.device, (rows, completion_offsets, group_offsets)
    host = torch.cat([part.to(torch.int64) for part in parts]).cpu()
    rows, completion_offsets, group_offsets = torch.split(host, [part.shape[0] for part in parts])
    size = int(rows.max()) + 1 if rows.numel() else 1
    group = segment_ids(completion_offsets[group_offsets], rows.shape[0])  # (M,)
    own = torch.unique(group * size + rows) // size  # (pairs,) the group of each pair of group and row
    counts = torch.bincount(own, minlength=group_offsets.shape[0] - 1)  # (G,)
    edges = _fill(counts.tolist(), chunk_rows)  # groups that begin a chunk, and G
    bounds = torch.tensor(edges)
    chunk = torch.bucketize(group, bounds[1:], right=True)  # (M,)
    pairs, order = (chunk * size + rows).sort(stable=True)  # (M,)
    distinct, counts = torch.unique_consecutive(pairs, return_counts=True)  # (U,)
    firsts = torch.searchsorted(distinct, torch.arange(len(edges)) * size).tolist()
    completions = group_offsets[bounds].tolist()
    chunks = tuple(
        Chunk(firsts[i], firsts[i + 1], slice(edges[i], edges[i + 1]), slice(completions[i], completions[i + 1]))
        for i in range(len(edges) - 1)
    )
    return HeadPlan(distinct % size, order, _starts(counts), chunks, chunk_rows).to(device)


def check_plan(plan: HeadPlan | None, rows: Tensor, num_groups: int | None = None) -> None:
    """Raises ValueError for a plan of other rows (M,), or of another number of groups. Its values are compared on the CPU only."""
    if plan is None:
        return
    if plan.order.shape != rows.shape or plan.order.device != rows.device:
        found = f"{plan.order.shape[0]} tokens on {plan.order.device}"
        raise ValueError(f"plan must be one of these {rows.shape[0]} rows on {rows.device}, not of {found}; see plan_groups")
    planned = plan.chunks[-1].groups.stop if plan.chunks else 0
    if num_groups is not None and planned != num_groups:
        raise ValueError(f"plan must cover the {num_groups} groups of group_offsets, not {planned}; see plan_groups")
    if rows.device.type == "cpu" and not torch.equal(rows[plan.order], plan.rows.repeat_interleave(plan.starts.diff())):
        raise ValueError("plan was made of other rows; make it anew with plan_groups")


def _fill(sizes: list[int], limit: int) -> list[int]:
    """Bounds of runs of `sizes` that add up to at most `limit`, or are one long.

    >>> _fill([2, 2, 1, 9, 1], 5)
    [0, 3, 4, 5]
    """
    bounds, filled = [0], 0
    for place, size in enumerate(sizes):
        if filled + size > limit and place > bounds[-1]:
            bounds.append(place)
            filled = 0
        filled += size
    return [*bounds, len(sizes)] if sizes else bounds


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _ALIGNMENT) * _ALIGNMENT


class LogitsBuffer:
    """One (C, V) buffer, in the dtype of the weight, that every chunk's logits are written to, without bias and softcap."""

    def __init__(self, weight: Tensor, num_rows: int) -> None:
        self._weight = weight
        self._buffer = weight.new_empty(num_rows, _padded(weight.shape[0]))[:, : weight.shape[0]]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (C, D) -> (C, V), which the next call overwrites."""
        # Forward and backward may run under different autocast settings, and have to make the same logits.
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.mm(hidden, self._weight.T, out=self._buffer[: hidden.shape[0]])


class HeadGradients:
    """d(hidden), d(weight) and d(bias) of those that are needed, summed over chunks; the kernel adds to d(bias) itself."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        self._source, self._weight = hidden, weight
        self._dtypes = (weight.dtype, None if bias is None else bias.dtype)
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        # Sums over chunks in float32: in bfloat16 the late chunks would be rounded away.
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None
        self.any = any(needed)

    def add(self, delta: Tensor, rows: Tensor, hidden: Tensor) -> None:
        """delta (C, V) the gradient of the logits of rows (C,), distinct; hidden (C, D) those rows."""
        with torch.autocast(delta.device.type, enabled=False):
            if self.hidden is not None:
                # Within a chunk every row is met once, so that index_add_ is as deterministic as an assignment.
                self.hidden.index_add_(0, rows, torch.mm(delta, self._weight))
            if self.weight is not None:
                _add_product(self.weight, delta.T, hidden)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """d(hidden) (T, D), d(weight) (V, D), d(bias) (V,), each in the dtype of what it belongs to."""
        weight = None if self.weight is None else self.weight.to(self._dtypes[0])
        return self.hidden, weight, None if self.bias is None else self.bias.to(self._dtypes[1])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (A, B) += left (A, C) @ right (C, B), total in float32, the others of one dtype.

    On CUDA the product is added as it is made, in float32. A product of its own in bfloat16 would be rounded once more, and
    reading it back and adding it is memory traffic of 10 bytes an element, as long as the product itself at C = 1,000.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # PyTorch has no out_dtype on a CPU
        total += torch.mm(left, right)
