"""allowed_logps against a softmax over masked logits in float64, and against completion_logps where every word is allowed."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.prompts import title_trie
from rec_dist.data.prompts.title_trie import TitleTrie, trie_of
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist_kernels import AllowedPlan, allowed_logps, completion_logps

D, V = 6, 40


def trie_from(titles: Sequence[Sequence[int]]) -> TitleTrie:
    tokens = np.asarray([token for title in titles for token in title], dtype=np.int32)
    return trie_of(tokens, offsets_of(np.asarray([len(title) for title in titles], dtype=np.int64)))


def catalogue(seed: int, *, size: int = 40, words: int = 9) -> list[list[int]]:
    """Titles that share beginnings, each with the end token 0."""
    rng = np.random.default_rng(seed)
    titles = {tuple((1 + rng.integers(0, words, size=rng.integers(1, 5))).tolist()) for _ in range(size)}
    return [[*title, 0] for title in sorted(titles)]


def prompt_of(titles: Sequence[Sequence[int]], *, groups: int, size: int, seed: int) -> GroupedPrompt:
    """Groups of `size` titles, each group at a branch point that all of its titles share."""
    rng = np.random.default_rng(seed)
    answers = [list(titles[item]) for item in rng.integers(0, len(titles), size=groups * size)]
    return GroupedPrompt(
        tokens=rng.integers(0, V, size=groups + 2).astype(np.int32),
        branch_points=np.arange(groups, dtype=np.int32),
        keys=np.arange(groups, dtype=np.int64),
        group_sizes=np.full(groups, size, dtype=np.int32),
        completion_inputs=np.asarray([token for answer in answers for token in answer[:-1]], dtype=np.int32),
        input_lengths=np.asarray([len(answer) - 1 for answer in answers], dtype=np.int32),
        lengths=np.asarray([len(answer) for answer in answers], dtype=np.int32),
        targets=np.asarray([token for answer in answers for token in answer], dtype=np.int32),
    )


def naive(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    batch: PackedBatch,
    titles: Sequence[Sequence[int]],
    temperature: float,
) -> Tensor:
    """(N,): all logits, minus infinity where no title goes on, and a log-softmax, token by token."""
    ends, sums = batch.completion_offsets.tolist(), []
    for start, stop in itertools.pairwise(ends):
        total = hidden.new_zeros(())
        for place in range(start, stop):
            logits = weight @ hidden[batch.rows[place]] + (0 if bias is None else bias)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            before = batch.targets[start:place].tolist()
            allowed = {
                title[len(before)] for title in titles if list(title[: len(before)]) == before and len(title) > len(before)
            }
            mask = torch.full_like(logits, -torch.inf)
            mask[sorted(allowed)] = 0.0
            total = total + (logits / temperature + mask).log_softmax(0)[batch.targets[place]]
        sums.append(total)
    return torch.stack(sums)


def leaves(batch: PackedBatch, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return [draw(batch.num_tokens, D), draw(V, D), draw(V)]


def graded(logps: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    weights = torch.linspace(0.5, 1.5, len(logps), dtype=logps.dtype)
    return [logps.detach(), *torch.autograd.grad((logps * weights).sum(), tensors)]


@pytest.mark.parametrize("chunk_logits", [title_trie.CHUNK_LOGITS, 40, 1])
@pytest.mark.parametrize(("bias", "softcap", "temperature"), [(False, None, 1.0), (True, None, 4.5), (True, 1.5, 0.7)])
@pytest.mark.parametrize("size", [1, 4])
def test_values_and_gradients_are_the_masked_softmax(
    chunk_logits: int, bias: bool, softcap: float | None, temperature: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(title_trie, "CHUNK_LOGITS", chunk_logits)
    titles = catalogue(0)
    batch = pack_prompts([prompt_of(titles, groups=3, size=size, seed=seed) for seed in (1, 2)])
    hidden, weight, own = leaves(batch, 3)
    tensors = [hidden, weight, *([own] if bias else [])]
    plan = trie_from(titles).plan(batch, temperature)
    found = graded(allowed_logps(hidden, weight, plan, bias=own if bias else None, softcap=softcap), tensors)
    expected = graded(naive(hidden, weight, own if bias else None, softcap, batch, titles, temperature), tensors)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    assert len(plan.chunks) > 1
    assert (found[0] < 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_the_naive_way_in_the_same_dtype(dtype: torch.dtype) -> None:
    titles = catalogue(4)
    batch = pack_prompts([prompt_of(titles, groups=4, size=2, seed=5)])
    given = leaves(batch, 6, dtype)
    plan = trie_from(titles).plan(batch, 2.0)
    exact = [leaf.detach().double().requires_grad_() for leaf in given]
    ours = graded(allowed_logps(given[0], given[1], plan, bias=given[2]), given)
    plain = graded(naive(given[0], given[1], given[2], None, batch, titles, 2.0), given)
    truth = graded(naive(exact[0], exact[1], exact[2], None, batch, titles, 2.0), exact)
    assert ours[0].dtype == torch.float32
    for found, same, right in zip(ours, plain, truth, strict=True):
        tolerance = torch.finfo(dtype).eps * right.abs().max()
        assert ((found.double() - right).abs() <= (same.double() - right).abs() + tolerance).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_with_every_word_allowed_it_is_the_vocabulary(softcap: float | None) -> None:
    titles = [list(title) for title in itertools.product(range(V), repeat=2)]
    batch = pack_prompts([prompt_of(titles, groups=3, size=2, seed=7)])
    hidden, weight, bias = leaves(batch, 8)
    plan = trie_from(titles).plan(batch, 1.0)
    arrays = (batch.rows, batch.targets, batch.completion_offsets)
    found = graded(allowed_logps(hidden, weight, plan, bias=bias, softcap=softcap), [hidden, weight, bias])
    expected = graded(completion_logps(hidden, weight, *arrays, bias=bias, softcap=softcap), [hidden, weight, bias])
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-13)


def test_a_token_without_an_alternative_costs_exactly_nothing() -> None:
    titles = [[3, 5, 0], [3, 5, 0]]
    batch = pack_prompts([prompt_of(titles, groups=2, size=2, seed=9)])
    hidden, weight, _ = leaves(batch, 10)
    plan = trie_from(titles).plan(batch, 1.0)
    logps, *gradients = graded(allowed_logps(hidden, weight, plan), [hidden, weight])
    assert plan.chunks == ()
    assert logps.tolist() == [0.0] * 4
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


def test_packing_does_not_change_values_or_gradients() -> None:
    titles = catalogue(11)
    trie = trie_from(titles)
    prompts = [prompt_of(titles, groups=2, size=2, seed=seed) for seed in (12, 13, 14)]
    whole = pack_prompts(prompts)
    hidden, weight, _ = leaves(whole, 15)
    together = allowed_logps(hidden, weight, trie.plan(whole, 1.5))
    parts, start = [], 0
    for prompt in prompts:
        batch = pack_prompts([prompt])
        parts.append(allowed_logps(hidden[start : start + batch.num_tokens], weight, trie.plan(batch, 1.5)))
        start += batch.num_tokens
    for ours, expected in zip(graded(together, [hidden, weight]), graded(torch.cat(parts), [hidden, weight]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


class Largest(TorchDispatchMode):
    """The most numbers of any result."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_nothing_is_as_large_as_the_vocabulary_times_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(title_trie, "CHUNK_LOGITS", 64)
    titles = catalogue(16)
    batch = pack_prompts([prompt_of(titles, groups=8, size=1, seed=seed) for seed in range(4)])
    hidden = torch.randn(batch.num_tokens, 2, requires_grad=True)
    weight = torch.randn(50_000, 2)
    plan = trie_from(titles).plan(batch, 1.0)
    with Largest() as seen:
        allowed_logps(hidden, weight, plan).sum().backward()
    assert seen.numbers <= 1000 < 50_000
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"words": torch.tensor([0, V])}, "words of the plan must lie in 0..39, got 0..40"),
        ({"rows": torch.tensor([-1])}, "rows of the plan must lie in"),
    ],
)
def test_faults_of_a_plan_are_named(change: dict[str, Any], message: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    fields: dict[str, Any] = dict.fromkeys(AllowedPlan._fields, none) | {"chunks": (), "temperature": 1.0}
    plan = AllowedPlan(**(fields | change))
    with pytest.raises(ValueError, match=message):
        allowed_logps(torch.zeros(3, D), torch.zeros(V, D), plan)
    good = AllowedPlan(**(fields | {"offsets": torch.zeros(1, dtype=torch.int64)}))
    with pytest.raises(ValueError, match="must share D"):
        allowed_logps(torch.zeros(3, D), torch.zeros(V, D + 1), good)
    with pytest.raises(ValueError, match="softcap must be positive"):
        allowed_logps(torch.zeros(3, D), torch.zeros(V, D), good, softcap=-1.0)
