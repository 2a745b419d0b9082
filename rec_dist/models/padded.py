"""Attention of prompts with their completions as plain matrix products: the path of bfloat16 on CPUs. It must equal `visible` in
attention.py.

Why: torch's attention on CPUs multiplies in blocks of its own, which leave AMX idle for most of its time. Here prompts of similar
length are padded to one square each, and a layer takes two batched products forward and five backward, whatever the number of
prompts. The scores of a call live only while it runs: the backward pass computes them again from query, key and value, so a layer
keeps nothing beside these. Cost: scores above the diagonal, which are masked, and at most 5 % of padding (per_prompt.shared_calls).

A call has n prompts of at most R rows, completions included. H heads of D numbers, T rows of the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

_SCORES_BYTES = 32 << 20  # of the scores of the heads that are in memory together
_ROWS = 32  # R is a multiple of it: the height of two AMX tiles, and few shapes, each of which is compiled once


@dataclass(frozen=True)
class Call:
    """places: (first row, rows) of its prompts in the batch. mask: (n, 1, R, R), 0 or minus infinity, to add to the scores."""

    places: list[tuple[int, int]]
    mask: Tensor

    @property
    def rows(self) -> int:
        """R."""
        return self.mask.shape[-1]


class PaddedMasks(BlockMask):
    """What the rows of each prompt may see. Subclasses BlockMask so that transformers passes it through unchanged."""

    ndim = 4  # GPT-2 reads it

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, 1, T, T), the shape of the equivalent dense mask."""
        length = sum(rows for call in self.calls for _, rows in call.places)
        return (1, 1, length, length)


def padded_masks(sizes: list[int], shared: list[list[int]], seen: Callable[[slice], Tensor], dtype: torch.dtype) -> PaddedMasks:
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
    return PaddedMasks(calls)


def padded_attention(query: Tensor, key: Tensor, value: Tensor, masks: PaddedMasks, scale: float | None) -> Tensor:
    """query (1, H, T, D), key and value (1, H / g, T, D) -> (1, T, H, D). scale: of the scores, None for D ** -0.5."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    answer: Tensor = _PaddedAttention.apply(query, key, value, masks.calls, scale)  # type: ignore[no-untyped-call]
    return answer


class _PaddedAttention(torch.autograd.Function):
    """O = P V, P = softmax(S), S = scale Q K^T + mask.

    dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: list[Call], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.calls, ctx.scale = calls, scale
        num, length, width = query.shape[1:]
        answer = query.new_empty(1, length, num, width)
        for call, heads, owners in _parts(calls, query, key):
            k, v = _gathered(key, call, owners), _gathered(value, call, owners)
            q = _gathered(query, call, heads).view(len(k), -1, width)
            weights = torch.softmax(_scores(q, k, call, scale), dim=-1)
            _scatter(torch.bmm(weights, v), answer.transpose(1, 2), call, heads)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grads = tuple(torch.empty_like(whole) for whole in (query, key, value))
        for call, heads, owners in _parts(ctx.calls, query, key):
            k, v = _gathered(key, call, owners), _gathered(value, call, owners)
            q, out = (_gathered(own, call, heads).view(len(k), -1, k.shape[2]) for own in (query, grad.transpose(1, 2)))
            scores = _scores(q, k, call, ctx.scale).requires_grad_()
            with torch.enable_grad():
                weights = torch.softmax(scores, dim=-1)
            by_weights = torch.bmm(out, v.transpose(1, 2))
            (by_scores,) = torch.autograd.grad(weights, scores, by_weights)
            _scatter(torch.bmm(weights.detach().transpose(1, 2), out), grads[2], call, owners)
            _scatter(torch.bmm(by_scores, k).mul_(ctx.scale), grads[0], call, heads)
            _scatter(torch.bmm(by_scores.transpose(1, 2), q).mul_(ctx.scale), grads[1], call, owners)
        return *grads, None, None


def _parts(calls: list[Call], query: Tensor, key: Tensor) -> Iterator[tuple[Call, slice, slice]]:
    """Each call with as many heads as _SCORES_BYTES has room for: (call, heads of query, heads of key)."""
    owners = key.shape[1]
    shared = query.shape[1] // owners
    for call in calls:
        room = _SCORES_BYTES // (call.mask.numel() * call.mask.element_size() * shared)
        step = min(max(room, 1), owners)
        for first in range(0, owners, step):
            last = min(first + step, owners)
            yield call, slice(first * shared, last * shared), slice(first, last)


def _gathered(whole: Tensor, call: Call, heads: slice) -> Tensor:
    """(1, H, T, D) -> (n * heads, R, D), zeros behind the rows of a prompt."""
    part = whole[0, heads]
    padded = whole.new_zeros(len(call.places), part.shape[0], call.rows, part.shape[2])
    for own, (start, rows) in zip(padded, call.places, strict=True):
        own[:, :rows] = part[:, start : start + rows]
    return padded.flatten(0, 1)


def _scores(query: Tensor, key: Tensor, call: Call, scale: float) -> Tensor:
    """query (n * h, g * R, D), key (n * h, R, D) -> (n * h, g * R, R), masked: the g heads that share a key lie end to end."""
    num, rows = len(call.places), call.rows
    scores = torch.bmm(query, key.transpose(1, 2))
    masked = scores.view(num, -1, rows, rows)
    return torch.add(call.mask, masked, alpha=scale, out=masked).view_as(scores)


def _scatter(part: Tensor, whole: Tensor, call: Call, heads: slice) -> None:
    """The inverse of _gathered: writes the rows of `part`, (n * heads * R, D) in any shape, into `whole` (1, H, T, D)."""
    padded = part.view(len(call.places), -1, call.rows, part.shape[-1])
    for own, (start, rows) in zip(padded, call.places, strict=True):
        whole[0, heads, start : start + rows] = own[:, :rows]
