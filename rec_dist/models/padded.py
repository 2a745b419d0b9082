"""The backward pass of attention as plain matrix products: for bfloat16 on CPUs. It must equal `visible` in attention.py.

Why: torch's own backward pass on CPUs multiplies in small blocks, which leave AMX idle for most of its time: 8 prompts of about 80
rows take 32 ms a layer there and 9 ms here (SmolLM2-135M's heads, one core). Its forward pass is as fast as this one or faster, so
that stays. Here prompts of similar length are padded to one square each, and a layer takes five batched products for all of them.
Weights are computed again from query, key and value. Cost: at most 5 % of padding (per_prompt.shared_calls), and scores of up to
_BLOCK rows above the diagonal, which are masked.

A call has n prompts of at most R rows, completions included. H heads of D numbers, g of which share a key. T rows of the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SCORES_BYTES = 32 << 20  # of the scores that are in memory together
_ROWS = 32  # R is a multiple of it: the height of two AMX tiles, and few shapes, each of which is compiled once
_BLOCK = 128  # rows at a time, with the columns up to the last of them: no row sees a later one

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """places: (first row, rows) of its prompts in the batch. mask: (n, 1, R, R), 0 or minus infinity, to add to the scores."""

    places: list[tuple[int, int]]
    mask: Tensor

    @property
    def rows(self) -> int:
        """R."""
        return self.mask.shape[-1]


def padded_calls(sizes: list[int], shared: list[list[int]], seen: Callable[[slice], Tensor], dtype: torch.dtype) -> list[Call]:
    """sizes: rows of each prompt with its completions. shared: the prompts of each call. seen: their rows -> (rows, rows) bool."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    calls = []
    for numbers in shared:
        rows = -(-max(sizes[number] for number in numbers) // _ROWS) * _ROWS
        mask = torch.full((len(numbers), 1, rows, rows), -torch.inf, dtype=dtype)
        for place, number in enumerate(numbers):
            start, size = starts[number], sizes[number]
            mask[place, 0, :size, :size].masked_fill_(seen(slice(start, start + size)), 0.0)
            mask[place, 0, size:, 0] = 0.0  # a row of padding sees something, or its softmax would be NaN
        calls.append(Call([(starts[number], sizes[number]) for number in numbers], mask))
    return calls


def with_padded_backward(forward: Forward, query: Tensor, key: Tensor, value: Tensor, calls: list[Call], scale: float) -> Tensor:
    """forward(query, key, value), and its gradients by matrix products.

    query (1, H, T, D), key and value (1, H / g, T, D) -> (1, T, H, D). scale: of the scores.
    """
    answer: Tensor = _Attention.apply(query, key, value, forward, calls, scale)  # type: ignore[no-untyped-call]
    return answer


class _Attention(torch.autograd.Function):
    """O = P V, P = softmax(S), S = scale Q K^T + mask.

    dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, forward: Forward, calls: list[Call], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.calls, ctx.scale = calls, scale
        return forward(query, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grads = tuple(torch.empty_like(whole) for whole in (query, key, value))
        for call, heads, owners in _parts(ctx.calls, query, key):
            q, out = (_gathered(whole, call, heads) for whole in (query, grad.transpose(1, 2)))
            k, v = (_gathered(whole, call, owners) for whole in (key, value))
            found = _gradients(q, k, v, out, call, ctx.scale)
            for whole, own, part in zip(grads, (heads, owners, owners), found, strict=True):
                _scatter(part, whole, call, own)
        return *grads, None, None, None


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """query, grad (n, h g, R, D), key, value (n, h, R, D) -> the gradients of query, key and value, of the same shapes."""
    num, owners, rows, width = key.shape
    key, value = key.flatten(0, 1), value.flatten(0, 1)  # (n h, R, D)
    by_query = torch.empty_like(query)
    by_key, by_value = (torch.zeros_like(key, dtype=torch.float32) for _ in range(2))  # sums over blocks
    for first in range(0, rows, _BLOCK):
        last = min(first + _BLOCK, rows)
        # (n h, g B, D): the g heads that share a key lie end to end.
        q, out = (whole[:, :, first:last].reshape(num * owners, -1, width) for whole in (query, grad))
        k, v = key[:, :last], value[:, :last]
        scores = torch.bmm(q, k.transpose(1, 2))  # (n h, g B, C)
        masked = scores.view(num, -1, last - first, last)
        torch.add(call.mask[:, :, first:last, :last], masked, alpha=scale, out=masked)
        with torch.enable_grad():
            weights = torch.softmax(scores.requires_grad_(), dim=-1)
        (by_scores,) = torch.autograd.grad(weights, scores, torch.bmm(out, v.transpose(1, 2)))
        by_value[:, :last] += torch.bmm(weights.detach().transpose(1, 2), out)
        by_key[:, :last] += torch.bmm(by_scores.transpose(1, 2), q)
        by_query[:, :, first:last] = torch.bmm(by_scores, k).mul_(scale).view(num, -1, last - first, width)
    return by_query, by_key.mul_(scale).view(num, owners, rows, width), by_value.view(num, owners, rows, width)


def _parts(calls: list[Call], query: Tensor, key: Tensor) -> Iterator[tuple[Call, slice, slice]]:
    """Each call with as many heads as _SCORES_BYTES has room for: (call, heads of query, heads of key)."""
    owners = key.shape[1]
    shared = query.shape[1] // owners
    for call in calls:
        scores = len(call.places) * min(call.rows, _BLOCK) * call.rows * shared * query.element_size()
        step = min(max(_SCORES_BYTES // scores, 1), owners)
        for first in range(0, owners, step):
            last = min(first + step, owners)
            yield call, slice(first * shared, last * shared), slice(first, last)


def _gathered(whole: Tensor, call: Call, heads: slice) -> Tensor:
    """(1, H, T, D) -> (n, heads, R, D), zeros behind the rows of a prompt."""
    part = whole[0, heads]
    padded = whole.new_zeros(len(call.places), part.shape[0], call.rows, part.shape[2])
    for own, (start, rows) in zip(padded, call.places, strict=True):
        own[:, :rows] = part[:, start : start + rows]
    return padded


def _scatter(part: Tensor, whole: Tensor, call: Call, heads: slice) -> None:
    """The inverse of _gathered: writes the rows of the prompts in `part` into `whole`."""
    for own, (start, rows) in zip(part, call.places, strict=True):
        whole[0, heads, start : start + rows] = own[:, :rows]
