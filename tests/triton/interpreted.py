"""The Triton kernels in Triton's interpreter on the CPU: against float64 truth, on hard inputs, in any chunking.

pytest does not collect this file by name: test_interpreter.py runs it in a process with TRITON_INTERPRET=1. Cost: a minute on a
core, and another for what is marked slow.
"""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from interpreter_rounding import convert, convert_to_nearest, round_to_nearest
from random_prompts import random_tree
from torch.utils._python_dispatch import TorchDispatchMode
from triton import language as tl

from benchmarks.acceptance import compare, plain_boundary, plain_logps, plain_preference, results
from rec_dist.config.schema import RunConfig
from rec_dist.methods.registry import build_task, find_initial_weights
from rec_dist.models import head
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist.runtime.world import World
from rec_dist.training.loader import step_work
from rec_dist_kernels import (
    completion_logps,
    plan_groups,
    preference_head,
    preference_loss,
    triton_boundary,
    triton_logits,
    triton_preference,
)
from rec_dist_kernels.boundary import boundary_shares
from rec_dist_kernels.triton_completion_logps import completion_logps_triton
from rec_dist_kernels.triton_preference_head import preference_head_triton

DTYPES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))
KINDS = ("sdpo", "dmpo")
MORE_KINDS = ("mppo", "dynamicpo")
D = 8


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    round_to_nearest(monkeypatch)


def test_the_interpreter_still_cuts_off():
    """If this fails, Triton rounds by itself, and convert_to_nearest can be removed."""
    values = np.array([1 + 2.0**-8 + 2.0**-9], dtype=np.float32)
    assert convert(values, tl.float32, tl.bfloat16, None).tolist() == [0x3F80]
    assert convert_to_nearest(values, tl.float32, tl.bfloat16, None).tolist() == [0x3F81]


def batch_of(vocabulary, seed=0, prompts=2):
    """Prompts with two branch points each, so rows are shared within a group and between groups. About 30 scored tokens."""
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, vocab_size=vocabulary, prompt=5, groups=2, max_negatives=2) for _ in range(prompts)]
    batch = pack_prompts([tree.grouped_prompt() for tree in trees])
    batch.targets[0], batch.targets[-1] = 0, vocabulary - 1
    return batch.with_reference(torch.from_numpy(rng.normal(-15, 4, size=len(batch.reference_logps))))


def leaves_of(batch, vocabulary, dtype, *, seed=0, scale=1.0, trainable=True, bias=True):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator) * scale
    tensors = [draw(batch.num_tokens, D), draw(vocabulary, D), *([draw(vocabulary)] if bias else [])]
    leaves = [tensor.to(dtype) for tensor in tensors]
    return [leaf.requires_grad_(trainable or place == 0) for place, leaf in enumerate(leaves)]


def logps_ops(batch, softcap=None, chunk_rows=None):
    scored = (batch.rows, batch.targets, batch.completion_offsets)
    truth = lambda h, w, b=None: [plain_logps(h, w, b, *scored, softcap)]
    plain = lambda h, w, b=None: [completion_logps(h, w, *scored, bias=b, softcap=softcap, impl="reference")]
    if chunk_rows is None:
        return truth, plain, lambda h, w, b=None: [completion_logps(h, w, *scored, bias=b, softcap=softcap, impl="triton")]
    return (
        truth,
        plain,
        lambda h, w, b=None: [completion_logps_triton(h, w, *scored, bias=b, softcap=softcap, chunk_rows=chunk_rows)],
    )


def head_ops(batch, kind="sdpo", softcap=None, beta=0.2, weights=None, margins=None):
    scored = (batch.rows, batch.targets, batch.completion_offsets)
    reference, groups = batch.reference_logps, batch.group_offsets

    def truth(h, w, b=None):
        logps = plain_logps(h, w, b, *scored, softcap)
        extra = {"lengths": batch.completion_offsets.diff().clamp(min=1), "margins": margins}
        losses = plain_preference(logps, reference.double(), groups, kind, beta, **extra)
        return [(losses if weights is None else losses * weights).sum(), logps.detach()]

    def run(impl):
        settings = {"kind": kind, "beta": beta, "softcap": softcap, "group_weights": weights, "margins": margins, "impl": impl}
        return lambda h, w, b=None: preference_head(h, w, *scored, reference, groups, bias=b, **settings)

    return truth, run("reference"), run("triton")


def test_batches_share_rows_within_and_between_groups():
    batch = batch_of(100)
    tokens = batch.completion_offsets[batch.group_offsets]
    parts = [set(batch.rows[a:b].tolist()) for a, b in pairwise(tokens.tolist())]
    assert sum(len(part) for part in parts) < len(batch.rows)
    assert len(set().union(*parts)) < sum(len(part) for part in parts)
    assert 1 in batch.group_offsets.diff().tolist()  # K = 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "softcap", "vocabulary"), [(False, None, 17), (True, 2.5, 128), (True, None, 2100)])
def test_completion_logps(dtype, bias, softcap, vocabulary):
    batch = batch_of(vocabulary)
    assert compare(*logps_ops(batch, softcap), leaves_of(batch, vocabulary, dtype, bias=bias)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bias", "softcap", "vocabulary"), [(False, None, 130), (True, 2.5, 70)])
def test_preference_head(dtype, kind, bias, softcap, vocabulary):
    batch = batch_of(vocabulary, seed=1)
    leaves = leaves_of(batch, vocabulary, dtype, seed=1, bias=bias)
    assert compare(*head_ops(batch, kind, softcap), leaves) == []


@pytest.mark.parametrize("chunk_rows", [1, 7, 10_000])
def test_completion_logps_in_any_chunking_and_block(chunk_rows, monkeypatch):
    for name in ("LSE_BLOCK", "GRADIENT_BLOCK", "BIAS_BLOCK", "SCALE_BLOCK"):
        monkeypatch.setattr(triton_logits, name, 64)
    for name in ("TOKENS_BLOCK", "COMPLETION_BLOCK"):
        monkeypatch.setattr(triton_logits, name, 2)
    batch = batch_of(150)
    assert compare(*logps_ops(batch, 3.0, chunk_rows), leaves_of(batch, 150, torch.float32)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_preference_head_in_any_chunking(kind, monkeypatch):
    monkeypatch.setattr(triton_preference, "GROUP_BLOCK", 2)
    batch = batch_of(150, seed=2)
    truth, plain, _ = head_ops(batch, kind)
    scored = (batch.rows, batch.targets, batch.completion_offsets, batch.reference_logps, batch.group_offsets)
    for chunk_rows in (1, 12, 10_000):  # from one group a chunk, the larger groups beyond the budget, to all groups in one
        run = lambda h, w, b, rows=chunk_rows: preference_head_triton(h, w, *scored, kind=kind, beta=0.2, bias=b, chunk_rows=rows)
        assert compare(truth, plain, run, leaves_of(batch, 150, torch.float32)) == []


@pytest.mark.parametrize("chunk_rows", [1, 12, 4096])
def test_a_plan_made_with_the_batch(chunk_rows):
    """Both operations take the same plan, also where their own limit is smaller than its chunks."""
    batch = batch_of(150, seed=4)
    arrays = (batch.rows, batch.targets, batch.completion_offsets)
    plan = plan_groups(batch.rows, batch.completion_offsets, batch.group_offsets, chunk_rows=chunk_rows)
    leaves = leaves_of(batch, 150, torch.float32)
    truth, plain, _ = logps_ops(batch)
    for limit in (7, None):
        run = lambda h, w, b, rows=limit: [completion_logps_triton(h, w, *arrays, bias=b, plan=plan, chunk_rows=rows)]
        assert compare(truth, plain, run, leaves) == []
    truth, plain, _ = head_ops(batch)
    scored = (*arrays, batch.reference_logps, batch.group_offsets)
    for limit in (12, None):
        run = lambda h, w, b, rows=limit: preference_head_triton(
            h, w, *scored, kind="sdpo", beta=0.2, bias=b, plan=plan, chunk_rows=rows
        )
        assert compare(truth, plain, run, leaves) == []


class Record(TorchDispatchMode):
    """Records the shapes of matrix products and the size in bytes of the largest result."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
            if "mm" in str(function):
                self.products.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("trainable", [False, True])
def test_head_costs_two_products_a_chunk_or_three_and_none_back(trainable):
    vocabulary, batch = 900, batch_of(900)
    leaves = leaves_of(batch, vocabulary, torch.float32, trainable=trainable, bias=False)
    scored = (batch.rows, batch.targets, batch.completion_offsets, batch.reference_logps, batch.group_offsets)
    with Record() as forward:
        loss, _ = preference_head_triton(*leaves, *scored, kind="sdpo", beta=0.1, chunk_rows=12)
    with Record() as backward:
        loss.backward()
    chunks = sum(shape[1] == vocabulary for shape in forward.products)
    assert chunks > 1
    assert len(forward.products) == chunks * (3 if trainable else 2)
    assert backward.products == []
    assert sum(shape[0] for shape in forward.products if shape[1] == vocabulary) >= len(batch.rows.unique())
    assert max(shape[0] for shape in forward.products if shape[1] == vocabulary) <= 12
    assert forward.largest == max(12 * 960, trainable * vocabulary * D) * 4  # a chunk, its rows padded
    assert (leaves[1].grad is not None) is trainable


def test_nothing_is_made_for_a_backward_pass_that_cannot_come():
    batch = batch_of(60)
    leaves = leaves_of(batch, 60, torch.float32)
    _, _, fused = head_ops(batch)
    expected = fused(*leaves)
    with torch.no_grad(), Record() as record:
        loss, logps = fused(*leaves)
    assert record.products == [(len(batch.rows.unique()), 60)]
    assert not loss.requires_grad
    assert torch.equal(loss, expected[0].detach())
    assert torch.equal(logps, expected[1])


def test_autocast_does_not_reach_inside():
    batch = batch_of(60)
    leaves = leaves_of(batch, 60, torch.float32)
    for op in (logps_ops(batch)[2], head_ops(batch)[2]):
        plain = op(*leaves)[0].detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(op(*leaves)[0], plain)


def test_group_weights_and_int32_offsets():
    batch = batch_of(60)
    weights = torch.linspace(0, 2, len(batch.group_offsets) - 1)  # the first is 0
    assert compare(*head_ops(batch, weights=weights), leaves_of(batch, 60, torch.float32)) == []
    leaves = leaves_of(batch, 60, torch.float32)
    offsets = (batch.completion_offsets, batch.group_offsets)
    results = []
    for dtype in (torch.int32, torch.int64):
        completions, groups = (array.to(dtype) for array in offsets)
        arrays = (batch.rows, batch.targets, completions, batch.reference_logps.float(), groups)
        results.append(preference_head(*leaves[:2], *arrays, kind="dmpo", beta=0.1, impl="triton"))
    assert torch.equal(results[0][0], results[1][0])
    nan = batch.reference_logps.clone()
    nan[: int(batch.group_offsets[1])] = torch.nan
    hidden = leaves[0].clone().detach().requires_grad_()
    arrays = (batch.rows, batch.targets, *offsets[:1], nan.float(), offsets[1])
    loss, _ = preference_head(hidden, leaves[1], *arrays, kind="sdpo", beta=0.1, group_weights=weights, impl="triton")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_may_be_views_with_gaps(dtype):
    """The kernels advance through memory one number at a time, so a view must be copied first."""
    batch = batch_of(60)
    leaves = leaves_of(batch, 60, torch.float32)
    apart = lambda array: torch.stack([array, torch.full_like(array, 7)], dim=1).flatten()[::2]
    arrays = (batch.rows, batch.targets, batch.completion_offsets, batch.reference_logps.float(), batch.group_offsets)
    num_groups = len(batch.group_offsets) - 1
    same = torch.full((num_groups,), 0.5, dtype=dtype)
    settings = {"kind": "sdpo", "beta": 0.2, "impl": "triton"}
    for weights in (apart(torch.linspace(0, 2, num_groups, dtype=dtype)), same[:1].expand(num_groups)):
        whole = lambda h, w, b, weights=weights: preference_head(
            h, w, *arrays, bias=b, group_weights=weights.contiguous(), **settings
        )
        views = lambda h, w, b, weights=weights: preference_head(
            h.T.contiguous().T, w.T.contiguous().T, *map(apart, arrays), bias=apart(b), group_weights=weights, **settings
        )
        for expected, found in zip(results(whole, leaves), results(views, leaves), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_logits_may_lie_beyond_two_to_the_31():
    """Row 2 of a buffer of 4 GB, of which some KB are touched. Its stride fits into int32, its offset does not."""
    vocabulary, stride = 96, (1 << 30) + 64
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(3, vocabulary, generator=generator).bfloat16()
    # The kernels work on whole blocks of a stored row, here 4,096 words.
    far = torch.empty(2 * stride + 4096, dtype=torch.bfloat16).as_strided((3, vocabulary), (stride, 1))
    near = torch.empty(3, 128, dtype=torch.bfloat16)[:, :vocabulary]
    tokens = (torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1, 3]), torch.tensor([5, 90, 7]))  # order, starts, targets
    found = []
    for logits in (far, near):
        logits.copy_(values)
        lse, logps, sums = torch.empty(3), torch.empty(3), torch.zeros(vocabulary)
        triton_logits.token_logps(logits, None, None, *tokens, lse, logps)
        owners = (torch.tensor([0, 0, 1]), torch.tensor([0.5, -1.0]))
        triton_logits.logits_gradient(logits, None, None, *tokens, *owners, lse, sums)
        found.append([lse, logps, sums, logits.float()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    expected = values.float().log_softmax(dim=1)[[0, 2, 2], tokens[2]]
    torch.testing.assert_close(found[0][1], expected, rtol=1e-5, atol=1e-5)


def test_the_largest_vocabulary():
    """V = 262,144: 64 blocks of the log-sum-exp, 128 of the gradient; targets in the first and the last."""
    vocabulary, generator = 262_144, torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(shape, generator=generator).bfloat16()
    arrays = (torch.tensor([0, 1]), torch.tensor([0, vocabulary - 1]), torch.tensor([0, 1, 2]))
    truth = lambda h, w: [plain_logps(h, w, None, *arrays, None)]
    run = lambda impl: lambda h, w: [completion_logps(h, w, *arrays, impl=impl)]
    leaves = [draw(2, 2).requires_grad_(), draw(vocabulary, 2).requires_grad_()]
    assert compare(truth, run("reference"), run("triton"), leaves) == []


def extreme(groups, lengths, vocabulary, values):
    """A batch whose logits are exact: width 1, hidden +-1e4, weight of -1, 0 and 1. groups: lists of completion counts."""
    rng = np.random.default_rng(3)
    completions = sum(groups)
    sizes = rng.choice(lengths, size=completions)
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    tokens = int(offsets[-1])
    integers = lambda top, size: torch.from_numpy(rng.integers(0, top, size=size))
    rows, bounds = integers(max(tokens, 1), tokens), torch.tensor([0, *np.cumsum(groups)]).long()
    batch = PackedBatch(
        *(torch.zeros(max(tokens, 1), dtype=torch.int64),) * 5,
        rows, integers(vocabulary, tokens), offsets, bounds, torch.zeros(len(groups)), torch.ones(len(groups)),
        torch.from_numpy(rng.normal(0, 5, size=completions)).float(), np.asarray([[max(tokens, 1), 0]]), 0,
        plan_groups(rows, offsets, bounds),
    )  # fmt: skip
    hidden = torch.full((max(tokens, 1), 1), float(values))
    hidden[::2] *= -1
    return batch, hidden, (integers(3, vocabulary) - 1).float()[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("groups", "lengths", "vocabulary", "values"),
    [
        ([3, 2, 4], [1, 2, 5], 300, 9984.0),  # a bfloat16 near 1e4
        ([3, 2, 4], [1, 2, 5], 300, 0.0),  # all equal
        ([1, 1], [3], 70, 1.0),  # no negatives at all
        ([2, 3], [0], 50, 1.0),  # M = 0: completions without tokens
        ([], [1], 50, 1.0),  # G = 0
        ([0, 2, 0], [1], 1, 1.0),  # empty groups, a vocabulary of one word
    ],
)
def test_hard_inputs(dtype, kind, groups, lengths, vocabulary, values):
    batch, hidden, weight = extreme(groups, lengths, vocabulary, values)
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    assert compare(*logps_ops(batch), leaves) == []
    assert compare(*head_ops(batch, kind), leaves) == []


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "dmpo"), (torch.bfloat16, "sdpo")])
def test_255_negatives(dtype, kind):
    batch, hidden, weight = extreme([256], [1], 40, 2.0)
    batch.rows[:] = 3  # one branch point
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype)]
    assert compare(*head_ops(batch, kind), leaves) == []


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_forbidden_words_have_probability_zero(scale, monkeypatch):
    """A bias of -inf, also over whole blocks of the vocabulary."""
    monkeypatch.setattr(triton_logits, "LSE_BLOCK", 64)
    batch = batch_of(200)
    hidden, weight, bias = leaves_of(batch, 200, torch.float32, scale=scale**0.5)
    bias = torch.zeros(200)
    bias[:130] = -torch.inf
    batch.targets.clamp_(min=130)
    assert compare(*head_ops(batch), [hidden, weight, bias]) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, "dpo"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0, 1e4])
def test_preference_loss(dtype, kind, scale):
    sizes = [2, 2, 1, 2] if kind == "dpo" else [3, 2, 1, 5, 0, 256]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    generator = torch.Generator().manual_seed(4)
    policy, reference = torch.randn(2, sum(sizes), generator=generator).mul(scale).to(dtype)
    truth = lambda p: [plain_preference(p, reference.double(), offsets, kind, 0.7), 0.7 * (p - reference.double()).detach()]
    run = lambda impl: lambda p: preference_loss(p, reference, offsets, kind=kind, beta=0.7, impl=impl)
    assert compare(truth, run("reference"), run("triton"), [policy.requires_grad_()]) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
@pytest.mark.parametrize("margins", [False, True])
def test_preference_loss_of_log_probs(dtype, kind, margins, monkeypatch):
    """Log-probs of titles instead of any numbers, since MPPO exponentiates them; groups that span blocks."""
    monkeypatch.setattr(triton_preference, "GROUP_BLOCK", 4)
    monkeypatch.setattr(triton_boundary, "GROUP_BLOCK", 4)
    offsets = torch.tensor([0, 3, 2, 1, 5, 0, 17, 9, 2]).cumsum(0)
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 7, size=int(offsets[-1]))
    policy, reference = (torch.from_numpy(-2.0 * lengths - rng.exponential(6.0, size=len(lengths))).to(dtype) for _ in range(2))
    extra = {"lengths": torch.from_numpy(lengths)}
    extra |= {"margins": torch.from_numpy(rng.uniform(0, 3, size=len(lengths))).float()} if margins else {}

    def truth(p):
        rewards = 0.7 * (torch.exp(p / extra["lengths"]) if kind == "mppo" else p - reference.double())
        return [plain_preference(p, reference.double(), offsets, kind, 0.7, **extra), rewards.detach()]

    run = lambda impl: lambda p: preference_loss(p, reference, offsets, kind=kind, beta=0.7, impl=impl, **extra)
    assert compare(truth, run("reference"), run("triton"), [policy.requires_grad_()]) == []


@pytest.mark.parametrize("seed", range(10))
def test_boundary_negatives_are_those_of_plain_lists(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 100, size=6)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    policy = torch.from_numpy(-rng.exponential(9.0, size=int(sizes.sum()))).float()
    policy[offsets[:-1][torch.from_numpy(sizes > 0)]] += 3.0 * float(rng.integers(0, 2))  # without a violation, clusters decide
    shares = torch.full_like(policy, torch.nan)
    triton_boundary.boundary(policy, offsets, shares)
    torch.testing.assert_close(shares, boundary_shares(policy, offsets), rtol=1e-5, atol=1e-7)
    for start, stop in pairwise(offsets.tolist()):
        if stop - start > 1:
            found = {place: share for place, share in enumerate(shares[start + 1 : stop].tolist()) if share}
            assert found == pytest.approx(plain_boundary(policy[start:stop].tolist()), rel=1e-4)


@pytest.mark.parametrize("kind", MORE_KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_more_kinds_of_preference_head(kind, weighted):
    """In float32: a boundary that rounding moves would make another loss, not a less exact one."""
    batch = batch_of(130, seed=1)
    rng = np.random.default_rng(2)
    margins = torch.from_numpy(rng.uniform(0, 3, size=len(batch.reference_logps))).float()
    weights = torch.linspace(0.5, 2, len(batch.weights)) if weighted else None
    leaves = leaves_of(batch, 130, torch.float32, seed=1)
    beta = 5.0 if kind == "mppo" else 0.2
    assert compare(*head_ops(batch, kind, None, beta, weights, margins), leaves) == []
    truth, plain, _ = head_ops(batch, kind, None, beta, None, margins)
    scored = (batch.rows, batch.targets, batch.completion_offsets, batch.reference_logps, batch.group_offsets)
    for chunk_rows in (1, 12, 10_000):
        run = lambda h, w, b, rows=chunk_rows: preference_head_triton(
            h, w, *scored, kind=kind, beta=beta, bias=b, margins=margins, chunk_rows=rows
        )
        assert compare(truth, plain, run, leaves) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_in_the_head(dtype):
    batch = batch_of(130, seed=1)
    margins = torch.linspace(3, 0, len(batch.reference_logps))
    assert compare(*head_ops(batch, "sdpo", margins=margins), leaves_of(batch, 130, dtype, seed=1)) == []


def test_small_losses_keep_their_relative_precision():
    policy = torch.tensor([0.0, -50.0, -50.0, 0.0, -9.0, 0.0, -3.0, 0.0, -1.0])
    loss, _ = preference_loss(policy, torch.zeros(9), torch.tensor([0, 3, 5, 7, 9]), beta=1.0, impl="triton")
    x = torch.tensor([-50 + np.log(2), -9.0, -3.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(loss.double(), x.exp().log1p(), rtol=4e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_rejects_what_is_wrong(dtype):
    """A coefficient off by 2 %, a sum that misses one token, a NaN: without this the tests above would prove nothing."""
    batch = batch_of(130, seed=1)
    leaves = leaves_of(batch, 130, dtype, seed=1)
    truth, plain, fused = head_ops(batch, "sdpo")
    assert compare(truth, plain, fused, leaves) == []
    wrong_beta = head_ops(batch, "sdpo", beta=0.204)[2]
    assert len(compare(truth, plain, wrong_beta, leaves)) >= 2
    other = batch.targets.clone()
    other[3] += 1
    wrong_target = head_ops(PackedBatch(**{**vars(batch), "targets": other}))[2]
    assert len(compare(truth, plain, wrong_target, leaves)) >= 4
    assert compare(truth, plain, lambda *x: [value * torch.nan for value in fused(*x)], leaves)


def test_a_kernel_with_a_wrong_coefficient_is_rejected(monkeypatch):
    """The same through the kernel itself, which gets the slopes of the other pooling."""
    kernel, batch = triton_preference.preference_kernel, batch_of(130, seed=1)

    class Swapped:
        def __getitem__(self, grid):
            return lambda *arguments, POOL, **rest: kernel[grid](*arguments, POOL=1 - POOL, **rest)  # noqa: N803

    leaves = leaves_of(batch, 130, torch.float32, seed=1)
    assert compare(*head_ops(batch, "sdpo"), leaves) == []
    monkeypatch.setattr(triton_preference, "preference_kernel", Swapped())
    assert len(compare(*head_ops(batch, "sdpo"), leaves)) == 4  # the loss and every gradient, but not the log-probs


def test_thirty_steps_take_the_same_course():
    """A small model on packed batches with AdamW: fused and reference losses agree step by step, and fall."""

    def train(impl):
        torch.manual_seed(5)
        embedding, hidden, head = torch.nn.Embedding(90, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 90, bias=False)
        parameters = [*embedding.parameters(), *hidden.parameters(), *head.parameters()]
        optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
        for step in range(30):
            batch = batch_of(90, seed=step % 3, prompts=1)
            states = torch.tanh(hidden(embedding(batch.input_ids) + 0.1 * batch.positions[:, None]))
            arrays = (
                batch.rows,
                batch.targets,
                batch.completion_offsets,
                batch.reference_logps.float(),
                batch.group_offsets,
            )
            loss, _ = preference_head(states, head.weight, *arrays, kind="sdpo", beta=0.1, impl=impl)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    fused, reference = train("triton"), train("reference")
    torch.testing.assert_close(fused, reference, rtol=1e-4, atol=1e-5)
    assert fused[-3:].sum() < 0.5 * fused[:3].sum()


@pytest.mark.slow
def test_thirty_steps_of_the_real_task_do_so_too(tiny_config, tmp_path, monkeypatch):
    """S-DPO on the tiny data and Llama, all weights, tied head, 20 to 40 s: fused and reference losses agree step by step."""
    changes = ("task.kind=sdpo", "adapter.kind=none", "train.global_batch_size=4", "train.max_steps=30", "train.epochs=9")
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", *changes))
    task = build_task(config, find_initial_weights(config), "cpu")
    plans = [step_work(task, step, max_tokens=512, world=World()) for step in range(30)]

    def train(impl):
        monkeypatch.setattr(head, "preference_head", partial(preference_head, impl=impl))
        torch.manual_seed(5)
        module, losses = task.model.build(), []
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        with torch.no_grad():
            batches = [batch.with_reference(module(batch)[2]) for plan in plans for batch in plan.batches]
        for batch in batches:
            loss, sums, _ = module(batch)
            optimizer.zero_grad()
            (loss / sums[1]).backward()
            optimizer.step()
            losses.append(float(sums[0] / sums[1]))
        return torch.tensor(losses)

    fused, reference = train("triton"), train("reference")
    assert len(fused) == 30
    torch.testing.assert_close(fused, reference, rtol=1e-3, atol=1e-4)
    # the policy equals the reference, so there is no preference among 1 + 3
    assert fused[0] == pytest.approx(np.log(4), abs=1e-5)
    assert fused.max() - fused.min() > 0.5  # it moves; three batches above show that it falls
