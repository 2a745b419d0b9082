"""completion_logps against log_softmax in float64: one Python loop over the completions."""

import doctest
import importlib
import importlib.util
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import rec_dist_kernels.segments
from rec_dist_kernels import completion_logps
from rec_dist_kernels.completion_logps import completion_logps_reference

T, D, V = 12, 6, 17
ROWS = torch.tensor([3, 4, 5, 3, 6, 3, 11, 9, 9, 10])  # branch points 3 and 9 predict the first token of several completions
TARGETS = torch.tensor([0, 16, 2, 0, 5, 8, 1, 1, 12, 3])
OFFSETS = torch.tensor([0, 3, 3, 5, 7, 8, 10])  # the second is empty


def truth(hidden, weight, bias=None, softcap=None, rows=ROWS, targets=TARGETS, offsets=OFFSETS):
    logits = F.linear(hidden[rows], weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    token_logps = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    return torch.stack([token_logps[start:end].sum() for start, end in pairwise(offsets.tolist())])


def inputs(seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(T, D), (V, D), (V,)]
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(dtype) for s in shapes]


def gradients(function, tensors, **keywords):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*leaves, **keywords)
    weights = torch.arange(1, value.shape[0] + 1, device=value.device).to(value.dtype)  # weights that distinguish the completions
    return value.detach(), torch.autograd.grad(value @ weights, leaves)


def ours(hidden, weight, bias=None, softcap=None, chunk_rows=None):
    if chunk_rows is None:
        return completion_logps(hidden, weight, ROWS, TARGETS, OFFSETS, bias=bias, softcap=softcap)
    return completion_logps_reference(hidden, weight, ROWS, TARGETS, OFFSETS, bias=bias, softcap=softcap, chunk_rows=chunk_rows)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 3, 7, 8, 100])
def test_values_and_gradients(with_bias, softcap, chunk_rows):
    tensors = inputs()[: 3 if with_bias else 2]
    value, grads = gradients(ours, tensors, softcap=softcap, chunk_rows=chunk_rows)
    expected, expected_grads = gradients(truth, tensors, softcap=softcap)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    assert value[1] == 0
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    leaves = [tensor.requires_grad_() for tensor in inputs(1)]
    run = lambda h, w, b: ours(h, w, b, softcap, chunk_rows=3)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_no_worse_than_torch_in_the_same_dtype(dtype, softcap):
    tensors = inputs(2, dtype)
    expected, expected_grads = gradients(truth, [tensor.double() for tensor in tensors], softcap=softcap)
    plain, plain_grads = gradients(truth, tensors, softcap=softcap)
    value, grads = gradients(ours, tensors, softcap=softcap)
    assert value.dtype == torch.float32
    compared = [(expected, plain, value), *zip(expected_grads, plain_grads, grads, strict=True)]
    for exact, same_dtype, mine in compared:
        # in the norm, not element by element: an element where torch happens to round well would be compared with 0
        error, allowed = (exact - mine).norm(), (exact - same_dtype).norm()
        # 5 %: both round equally often and by as much, but not at the same elements
        assert error <= 1.05 * allowed + 1e-6 * exact.norm(), (error, allowed)


def test_frozen_inputs_get_no_gradient_work():
    hidden, weight, bias = inputs(3)
    products = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "mm" in str(function):
                products.append(tuple(result.shape))
            return result

    for frozen in (True, False):
        products.clear()
        with Record():
            value = ours(hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen), bias)
            value.sum().backward()
        assert ((V, D) in products) is not frozen
    leaf = weight.clone().requires_grad_()
    with Record():
        products.clear()
        ours(hidden, leaf, bias).sum().backward()
    assert products.count((8, D)) == 0  # d(hidden) of the 8 distinct rows
    assert leaf.grad.abs().sum() > 0


def test_no_intermediate_is_larger_than_a_chunk():
    vocabulary, chunk_rows = 1000, 2
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(vocabulary, D)
    largest = 0

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Record():
        value = completion_logps_reference(hidden, weight, ROWS, TARGETS, OFFSETS, chunk_rows=chunk_rows)
        value.sum().backward()
    assert max(chunk_rows, D) * vocabulary == largest  # the (V, D) weight itself, transposed, is the larger
    assert largest < len(ROWS) * vocabulary


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_a_second_backward_pass_finds_what_the_first_did(chunk_rows):
    """The first pass takes the logits of the last chunk from the forward pass and overwrites them."""
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    value = ours(*leaves, chunk_rows=chunk_rows).sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("chunk_rows", "made"), [(100, 1), (4, 3)])
def test_the_logits_of_the_last_chunk_are_made_once(monkeypatch, chunk_rows, made):
    """7 distinct rows are one chunk, or two of which the first is computed again."""
    module = importlib.import_module("rec_dist_kernels.completion_logps")
    calls = []
    plain = module._logits
    monkeypatch.setattr(module, "_logits", lambda *given: calls.append(1) or plain(*given))
    gradients(ours, inputs(), chunk_rows=chunk_rows)
    assert len(calls) == made


def test_distinct_rows_are_multiplied_once():
    widths = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "mm" in str(function):
                widths.append(result.shape[0])
            return result

    hidden, weight, _ = inputs()
    with Record():
        ours(hidden, weight)
    assert widths == [len(set(ROWS.tolist()))] == [7]


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_nothing_to_score_still_runs_backward(offsets):
    none = torch.zeros(0, dtype=torch.int64)
    hidden, weight, bias = (tensor.requires_grad_() for tensor in inputs())
    value = completion_logps(hidden, weight, none, none, torch.tensor(offsets), bias=bias)
    assert value.tolist() == [0.0] * (len(offsets) - 1)
    value.sum().backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() == 0


def test_huge_logits_stay_finite():
    hidden, weight, _ = inputs(4, torch.float32, scale=100.0)
    value, grads = gradients(ours, [hidden, weight])
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_autocast_does_not_reach_inside():
    hidden, weight, _ = inputs(5, torch.float32)
    plain, plain_grads = gradients(ours, [hidden, weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = gradients(ours, [hidden, weight])
    assert torch.equal(value, plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(T, D + 1)}, "must share D"),
        ({"hidden": torch.zeros(T, D, dtype=torch.bfloat16)}, "one floating dtype"),
        ({"targets": TARGETS[:-1]}, r"both have shape \(M,\)"),
        ({"rows": ROWS.int()}, "rows must be int64"),
        ({"rows": ROWS - 4}, r"rows must lie in 0..11, got -1..7"),
        ({"targets": TARGETS + 1}, r"targets must lie in 0..16, got 1..17"),
        ({"completion_offsets": OFFSETS[:-1]}, "completion_offsets must run from 0 to 10"),
        ({"bias": torch.zeros(V + 1)}, "bias must have shape"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"impl": "triton"}, 'completion_logps cannot run impl="triton": the tensors are on cpu'),
        ({"hidden": torch.zeros(T, D).double(), "weight": torch.zeros(V, D).double(), "impl": "triton"}, "not float64"),
    ],
)
def test_faults_are_named(change, message):
    arguments = {
        "hidden": torch.zeros(T, D),
        "weight": torch.zeros(V, D),
        "rows": ROWS,
        "targets": TARGETS,
        "completion_offsets": OFFSETS,
    }
    with pytest.raises(ValueError, match=message):
        completion_logps(**(arguments | change))


def test_docstring_examples():
    result = doctest.testmod(rec_dist_kernels.segments)
    assert (result.attempted, result.failed) == (1, 0)


def test_triton_is_asked_for_in_vain_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    hidden, weight, _ = inputs(6, torch.float32)
    with pytest.raises(ValueError, match="the package triton is not installed; use impl="):
        completion_logps(hidden, weight, ROWS, TARGETS, OFFSETS, impl="triton")
    assert completion_logps(hidden, weight, ROWS, TARGETS, OFFSETS).shape == (6,)
