"""The backward pass as padded matrix products equals that of the dense mask, whatever shares a call, a block or a buffer."""

from functools import partial

import numpy as np
import pytest
import torch
from random_prompts import random_tree
from torch import Tensor
from torch.nn import functional as F

from rec_dist.models import padded
from rec_dist.models.attention import visible, visible_rows
from rec_dist.models.attention_paths import one_of_few
from rec_dist.models.padded import Call, padded_calls, with_padded_backward
from rec_dist.models.per_prompt import prompt_masks, shared_calls
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts

SIZES = [(30, 6), (2, 1), (25, 2), (29, 1), (70, 2), (1, 1)]  # prompt tokens, groups
HEADS, OWNERS, WIDTH = 6, 2, 16
SCALE = 0.3


def batch_of(seed: int = 0) -> PackedBatch:
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, vocab_size=61, prompt=prompt, groups=groups) for prompt, groups in SIZES]
    return pack_prompts([tree.grouped_prompt() for tree in [*trees, trees[0], trees[2]]])


def calls_of(batch: PackedBatch, window: int | None, dtype: torch.dtype) -> list[Call]:
    lengths = torch.unique_consecutive(batch.prompt_ids, return_counts=True)[1].tolist()
    shared = shared_calls(lengths, [True] * len(lengths))
    return padded_calls(lengths, shared, lambda rows: visible_rows(batch, rows, rows, window=window), dtype)


def tensors(length: int, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and a gradient of the output; queries lie as a model's projections leave them."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, length, heads, WIDTH) for heads in (HEADS, OWNERS, OWNERS, HEADS)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*(one.transpose(1, 2).requires_grad_() for one in made[:3]), made[3]]


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True).transpose(1, 2)


def test_the_case_has_calls_of_one_and_of_several_prompts() -> None:
    calls = calls_of(batch_of(), None, torch.float64)
    assert {len(call.places) > 1 for call in calls} == {True, False}
    assert all(call.rows % 32 == 0 for call in calls)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("split", ["whole", "by heads", "by rows"])
def test_gradients_are_those_of_the_dense_mask(window: int | None, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded, "_SCORES_BYTES", 1 if split == "by heads" else 1 << 30)
    monkeypatch.setattr(padded, "_BLOCK", 16 if split == "by rows" else 128)
    batch = batch_of()
    query, key, value, grad = tensors(batch.num_tokens, torch.float64)
    plain = partial(dense, mask=visible(batch, window=window))
    expected = torch.autograd.grad(plain(query, key, value), (query, key, value), grad)
    found = with_padded_backward(plain, query, key, value, calls_of(batch, window, torch.float64), SCALE)
    assert torch.equal(found, plain(query, key, value))
    gradients = torch.autograd.grad(found, (query, key, value), grad)
    for name, own, other in zip(("query", "key", "value"), gradients, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5, msg=name)  # sums over blocks are float32


def test_a_row_that_sees_one_more_shows() -> None:
    """Otherwise the test above could pass with a wrong mask."""
    batch = batch_of()
    query, key, value, grad = tensors(batch.num_tokens, torch.float64)
    mask = visible(batch)
    wanted = torch.autograd.grad(dense(query, key, value, mask), (query, key, value), grad)
    mask[5, 6] = True
    found = with_padded_backward(partial(dense, mask=mask), query, key, value, calls_of(batch, None, torch.float64), SCALE)
    wider = torch.autograd.grad(dense(query, key, value, mask), (query, key, value), grad)
    assert max(float((one - other).abs().max()) for one, other in zip(wider, wanted, strict=True)) > 1e-3
    narrow = torch.autograd.grad(found, (query, key, value), grad)
    assert max(float((one - other).abs().max()) for one, other in zip(narrow, wanted, strict=True)) < 1e-5


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """As transformers' eager attention rounds: scores to the dtype, a float32 softmax, weights to the dtype."""
    key, value = (one.repeat_interleave(HEADS // OWNERS, dim=1) for one in (key, value))
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2)


def test_bfloat16_is_as_near_to_the_truth_as_plain_torch() -> None:
    batch = batch_of()
    exact = tensors(batch.num_tokens, torch.float64)
    rounded = [one.detach().bfloat16().requires_grad_(one.requires_grad) for one in exact]
    seen, calls = visible(batch), calls_of(batch, None, torch.bfloat16)
    outputs = [
        dense(*exact[:3], seen),
        eager(*rounded[:3], seen),
        with_padded_backward(partial(dense, mask=seen), *rounded[:3], calls, SCALE),
    ]
    grads = [
        torch.autograd.grad(out, inputs, grad) for out, (*inputs, grad) in zip(outputs, (exact, rounded, rounded), strict=True)
    ]
    for truth, plain, own in zip(*grads, strict=True):
        error, allowed = ((one.double() - truth).norm() / truth.norm() for one in (own, plain))
        assert float(error) <= 1.1 * float(allowed), (float(error), float(allowed))


def test_bfloat16_on_a_cpu_takes_this_path_where_there_is_a_backward_pass() -> None:
    class Config:
        sliding_window = None

    batch = batch_of()
    assert prompt_masks(batch, Config(), torch.bfloat16).backward is not None
    assert prompt_masks(batch, Config(), torch.float32).backward is None
    with torch.no_grad():
        assert prompt_masks(batch, Config(), torch.bfloat16).backward is None


def test_padding_rows_that_are_joined_are_one_prompt_that_no_other_row_sees() -> None:
    batch = batch_of()
    padded_batch = batch.padded_to(batch.num_tokens + 7, joined=True)
    seen = visible(padded_batch)
    assert torch.equal(seen[:-7, :-7], visible(batch))
    assert not seen[:-7, -7:].any() and not seen[-7:, :-7].any()
    assert torch.equal(seen[-7:, -7:], torch.ones(7, 7).tril().bool())


def test_a_batch_takes_one_of_few_lengths() -> None:
    lengths = {one_of_few(length) for length in range(513, 4097)}
    assert len(lengths) == 48
    assert all(length <= one_of_few(length) <= max(length + 15, length * 17 / 16) for length in range(1, 5000))
