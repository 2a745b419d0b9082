"""How the fused head is cut into chunks: which rows of logits are in memory together, their buffer, and their gradients.

Why: the logits of one chunk are the only large tensor, so the chunk size sets the head's memory, and a row
that several completions share (the branch point of a prompt) is multiplied once per chunk.
Cost: a few sorts of M integers and four device synchronisations per call, before the first GEMM.

T rows of the batch, D width, V vocabulary, M scored tokens, N completions, G groups, U rows to multiply (each row once per
chunk), C rows of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rec_dist_kernels.segments import segment_ids

# Of logits. V = 128,000 in bfloat16 gives 1,048 rows: a GEMM reads the whole weight a chunk, 2 bytes for 2 C operations, and a
# GPU of 800 TFLOP/s and 3.4 TB/s needs C > 240 for that to hide. A fused pass over the logits, which then come from memory and
# not from the cache, is 2 bytes a logit beside the 2 D operations that made it: 6 % at D = 4,096.
CHUNK_BYTES = 256 << 20
_ALIGNMENT = 64  # elements between the rows of a buffer: 128 bytes in bfloat16, so that any V loads 16 bytes at a time


class Chunk(NamedTuple):
    """Places first..last-1 of Plan.rows, and the groups and completions they serve (none where these do not matter)."""

    first: int
    last: int
    groups: slice = slice(0)
    completions: slice = slice(0)


class Plan(NamedTuple):
    """Row c of the U predicts the tokens order[starts[c]] .. order[starts[c+1]-1]."""

    rows: Tensor  # (U,) rows of hidden; distinct within a chunk
    order: Tensor  # (M,) tokens by their row
    starts: Tensor  # (U+1,)
    chunks: list[Chunk]

    @property
    def largest(self) -> int:
        """C of the largest chunk."""
        return max((chunk.last - chunk.first for chunk in self.chunks), default=0)


def rows_of_chunk(weight: Tensor) -> int:
    """C that fills CHUNK_BYTES, for weight (V, D)."""
    return max(1, CHUNK_BYTES // (_padded(weight.shape[0]) * weight.dtype.itemsize))


def plan_rows(rows: Tensor, chunk_rows: int) -> Plan:
    """rows (M,): each distinct row once, chunk_rows at a time."""
    distinct, inverse, counts = torch.unique(rows, return_inverse=True, return_counts=True)
    size = distinct.shape[0]
    chunks = [Chunk(first, min(first + chunk_rows, size)) for first in range(0, size, chunk_rows)]
    return Plan(distinct, inverse.argsort(stable=True), _starts(counts), chunks)


def plan_groups(rows: Tensor, completion_offsets: Tensor, group_offsets: Tensor, num_rows: int, chunk_rows: int) -> Plan:
    """rows (M,) in 0..num_rows-1, completion_offsets (N+1,), group_offsets (G+1,): chunks of whole, consecutive groups.

    A chunk takes groups while their rows, each group's distinct ones, add up to at most chunk_rows, and at least
    one group: what a group needs to know about its completions is known when its chunk ends.
    """
    group_offsets = group_offsets.to(torch.int64)
    num_groups = group_offsets.shape[0] - 1
    group = segment_ids(completion_offsets.to(torch.int64)[group_offsets], rows.shape[0])  # (M,)
    own = torch.unique(group * num_rows + rows) // max(num_rows, 1)  # (pairs,) the group of each pair of group and row
    edges = _fill(torch.bincount(own, minlength=num_groups).tolist(), chunk_rows)  # groups that begin a chunk, and G
    bounds = torch.tensor(edges, device=rows.device)
    chunk = torch.bucketize(group, bounds[1:], right=True)  # (M,)
    pairs, inverse, counts = torch.unique(chunk * num_rows + rows, return_inverse=True, return_counts=True)  # (U,)
    places = torch.searchsorted(pairs, torch.arange(len(edges), device=rows.device) * num_rows)
    firsts, completions = torch.stack([places, group_offsets[bounds]]).tolist()
    chunks = [
        Chunk(firsts[i], firsts[i + 1], slice(edges[i], edges[i + 1]), slice(completions[i], completions[i + 1]))
        for i in range(len(edges) - 1)
    ]
    return Plan(pairs % max(num_rows, 1), inverse.argsort(stable=True), _starts(counts), chunks)


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
                self.weight += torch.mm(delta.T, hidden)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """d(hidden) (T, D), d(weight) (V, D), d(bias) (V,), each in the dtype of what it belongs to."""
        weight = None if self.weight is None else self.weight.to(self._dtypes[0])
        return self.hidden, weight, None if self.bias is None else self.bias.to(self._dtypes[1])
