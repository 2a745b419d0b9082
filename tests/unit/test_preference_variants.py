"""MPPO, DynamicPO and margins (RecPO): by hand, against a naive truth in float64, and inside the head."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.acceptance import plain_boundary, plain_preference
from rec_dist.losses import preference_sums
from rec_dist_kernels import completion_logps, preference_head, preference_loss
from rec_dist_kernels.boundary import boundary_shares

KINDS: list[Any] = ["sdpo", "dmpo", "mppo", "dynamicpo"]
SIZES = (3, 2, 1, 5, 0, 9, 16)


def ragged(seed: int, *, spread: float = 6.0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Log-probs of titles of 1 to 6 tokens, two nats a token, with the reference near them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, size=sum(SIZES))
    policy = -2.0 * lengths - rng.exponential(spread, size=len(lengths))
    return {
        "policy": torch.tensor(policy, dtype=dtype),
        "reference": torch.tensor(policy + rng.normal(0, 2, size=len(policy)), dtype=dtype),
        "offsets": torch.tensor([0, *SIZES]).cumsum(0),
        "lengths": torch.from_numpy(lengths),
        "margins": torch.tensor(rng.uniform(0, 3, size=len(policy)), dtype=dtype),
    }


def both(
    data: dict[str, Tensor], kind: str, *, margins: bool, beta: float = 0.7
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(losses, d(weighted sum)/d(policy)) of the operation, and of the truth."""
    results = []
    for truth in (False, True):
        policy = data["policy"].double() if truth else data["policy"]
        leaf = policy.clone().requires_grad_()
        extra = {"lengths": data["lengths"], "margins": data["margins"] if margins else None}
        if truth:
            loss = plain_preference(leaf, data["reference"].double(), data["offsets"], kind, beta, **extra)
        else:
            named: Any = kind
            loss, _ = preference_loss(leaf, data["reference"], data["offsets"], kind=named, beta=beta, **extra)
        (loss * torch.arange(1.0, len(SIZES) + 1, dtype=loss.dtype)).sum().backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    return results[0], results[1]


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_the_formula(seed: int, kind: str, margins: bool) -> None:
    (loss, grad), (expected, expected_grad) = both(ragged(seed), kind, margins=margins)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-14)
    assert (loss == 0).tolist() == [size < 2 for size in SIZES]
    starts = torch.tensor([0, *SIZES]).cumsum(0)[:-1]
    assert all(grad[start] < 0 for start, size in zip(starts.tolist(), SIZES, strict=True) if size > 1)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_near_the_truth(kind: str) -> None:
    (loss, grad), (expected, expected_grad) = both(ragged(5, dtype=torch.float32), kind, margins=True)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sdpo", "dmpo", "mppo"])  # the shares of dynamicpo are constants, and move with the policy
def test_gradcheck(kind: Any) -> None:
    data = ragged(1)
    run = lambda p: preference_loss(
        p, data["reference"], data["offsets"], kind=kind, beta=0.5, lengths=data["lengths"], margins=data["margins"]
    )[0]
    assert torch.autograd.gradcheck(run, (data["policy"].requires_grad_(),))


def test_mppo_by_hand() -> None:
    policy = torch.tensor([2 * math.log(0.5), 3 * math.log(0.2), math.log(0.4)], dtype=torch.float64, requires_grad=True)
    lengths, nothing = torch.tensor([2, 3, 1]), torch.full((3,), math.nan, dtype=torch.float64)
    loss, rewards = preference_loss(policy, nothing, torch.tensor([0, 3]), kind="mppo", beta=1.0, lengths=lengths)
    assert rewards.tolist() == pytest.approx([0.5, 0.2, 0.4], rel=1e-14)  # the geometric mean of a token's likelihood
    x = 2 * 0.5 - 0.2 - 0.4
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-x)), rel=1e-14)
    loss.backward()
    wrong = 1 / (1 + math.exp(x))
    assert policy.grad.tolist() == pytest.approx([-wrong * 2 * 0.5 / 2, wrong * 0.2 / 3, wrong * 0.4], rel=1e-13)


def test_recpo_margin_by_hand() -> None:
    # rewards 0, -1, -2; the second negative has to be 3 below
    policy = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    margins = torch.tensor([99.0, 0.5, 3.0], dtype=torch.float64)
    loss, rewards = preference_loss(
        policy, torch.full((3,), -1.0).double(), torch.tensor([0, 3]), kind="sdpo", beta=1.0, margins=margins
    )
    a, b = math.exp(-1 + 0.5), math.exp(-2 + 3)
    assert rewards.tolist() == [0, -1, -2]
    assert loss.item() == pytest.approx(math.log(1 + a + b), rel=1e-14)
    loss.backward()
    assert policy.grad.tolist() == pytest.approx([-(a + b) / (1 + a + b), a / (1 + a + b), b / (1 + a + b)], rel=1e-13)


def test_no_margin_is_a_margin_of_zero() -> None:
    data = ragged(2)
    arrays = (data["policy"], data["reference"], data["offsets"])
    plain, _ = preference_loss(*arrays, kind="sdpo", beta=0.3)
    zero, _ = preference_loss(*arrays, kind="sdpo", beta=0.3, margins=torch.zeros_like(data["margins"]))
    assert torch.equal(plain, zero)


@pytest.mark.parametrize(
    ("logps", "expected"),
    [
        ([-5.0, -4.0, -9.0, -5.0, -6.0], [0, 2]),  # those that violate the preference, ties included
        ([-1.0, -9.0, -2.0, -2.2, -5.0, -5.1], [1, 2]),  # nobody does: the highest of three clusters
        ([-1.0, -20.0, -11.0, -10.0], [2]),  # three values are three clusters
        ([-1.0, -7.0, -7.0], [0, 1]),  # equal ones are one cluster
        ([-1.0, -7.0], [0]),
        ([-9.0, -7.0, -8.0], [0, 1]),  # all violate it
    ],
)
def test_boundary_negatives_by_hand(logps: list[float], expected: list[int]) -> None:
    values = torch.tensor(logps, dtype=torch.float64)
    shares = boundary_shares(values, torch.tensor([0, len(logps)]))
    assert shares[0] == 0
    assert (shares[1:] > 0).nonzero().flatten().tolist() == expected
    others = [value for i, value in enumerate(logps[1:]) if i not in expected] or [logps[1 + i] for i in expected]
    easy = sum(others) / len(others)
    for i in expected:
        above, below = logps[0] - logps[1 + i], logps[1 + i] - easy
        factor = 1 + 0.5 * math.tanh((above - below - 2) / (abs(above) + abs(below)))
        assert shares[1 + i].item() == pytest.approx(factor / len(expected), rel=1e-12)
        assert 0.5 <= factor <= 1.5


def test_equal_log_probs_halve_beta() -> None:
    """0 / 0 in the formula; the limit from (a - b - 2) / (|a| + |b|) is tanh(-inf)."""
    shares = boundary_shares(torch.full((4,), -3.0), torch.tensor([0, 4]))
    assert shares.tolist() == pytest.approx([0.0, 0.5 / 3, 0.5 / 3, 0.5 / 3])


@pytest.mark.parametrize("seed", range(20))
def test_boundary_shares_are_those_of_plain_lists(seed: int) -> None:
    data = ragged(seed)
    shares = boundary_shares(data["policy"], data["offsets"])
    for start, stop in zip(data["offsets"].tolist(), data["offsets"][1:].tolist(), strict=False):
        if stop - start > 1:
            expected = plain_boundary(data["policy"][start:stop].tolist())
            found = {i: share for i, share in enumerate(shares[start + 1 : stop].tolist()) if share}
            assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 1], [0, 0, 1, 1, 2]])
def test_groups_without_negatives_and_no_groups(kind: Any, offsets: list[int]) -> None:
    policy = (-torch.rand(offsets[-1])).requires_grad_()
    extra = {"lengths": torch.ones(offsets[-1], dtype=torch.int64), "margins": torch.ones(offsets[-1])}
    loss, _ = preference_loss(policy, torch.zeros(offsets[-1]), torch.tensor(offsets), kind=kind, beta=1.0, **extra)
    loss.sum().backward()
    assert loss.tolist() == [0.0] * (len(offsets) - 1)
    assert policy.grad is not None and policy.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_packing_and_groups_of_weight_zero_do_not_change_sums(kind: Any) -> None:
    data = ragged(3)
    names = ("policy", "reference", "lengths", "margins")
    cut = int(data["offsets"][4])

    def sums(own: slice, offsets: Tensor, weights: Tensor | None = None) -> Any:
        policy, reference, lengths, margins = (data[name][own] for name in names)
        extra = {"lengths": lengths, "margins": margins, "group_weights": weights}
        return preference_sums(policy, reference, offsets - int(offsets[0]), kind=kind, beta=0.5, **extra)

    whole = sums(slice(None), data["offsets"])
    parts = [sums(slice(0, cut), data["offsets"][:5]), sums(slice(cut, None), data["offsets"][4:])]
    assert sum(part.loss_sum.item() for part in parts) == pytest.approx(whole.loss_sum.item(), rel=1e-13)
    assert sum(part.count.item() for part in parts) == whole.count.item()
    for name in whole.metrics:
        assert sum(part.metrics[name].item() for part in parts) == pytest.approx(whole.metrics[name].item(), rel=1e-12)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    data["policy"][cut:] = math.nan
    assert sums(slice(None), data["offsets"], weights).loss_sum.item() == pytest.approx(parts[0].loss_sum.item(), rel=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_head_is_the_two_composed(kind: Any, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    rows, targets = torch.tensor([2, 3, 2, 2, 6, 7, 6, 8]), torch.tensor([1, 10, 4, 0, 2, 2, 9, 5])
    completions, groups = torch.tensor([0, 2, 3, 4, 6, 8]), torch.tensor([0, 3, 5])
    reference, margins = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64) if weighted else torch.ones(2, dtype=torch.float64)
    ours, composed = (hidden.clone().requires_grad_() for _ in range(2))
    loss_sum, logps = preference_head(
        ours, weight, rows, targets, completions, reference, groups,
        kind=kind, beta=0.4, margins=margins, group_weights=weights if weighted else None,
    )  # fmt: skip
    expected_logps = completion_logps(composed, weight, rows, targets, completions)
    extra = {"lengths": completions.diff(), "margins": margins}
    expected = (plain_preference(expected_logps, reference, groups, kind, 0.4, **extra) * weights).sum()
    loss_sum.backward()
    expected.backward()
    torch.testing.assert_close(logps, expected_logps.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(loss_sum, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(ours.grad, composed.grad, rtol=1e-11, atol=1e-14)
    assert ours.grad is not None and ours.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mppo"}, r'kind="mppo" needs lengths of shape \(N,\) = \(3,\), got None'),
        ({"kind": "mppo", "lengths": torch.ones(2)}, r"got \(2,\)"),
        ({"margins": torch.ones(2)}, r"margins must be floating of shape \(N,\) = \(3,\)"),
        ({"margins": torch.ones(3, dtype=torch.int64)}, "margins must be floating"),
    ],
)
def test_faults_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(3), torch.zeros(3), torch.tensor([0, 3]), **({"kind": "sdpo", "beta": 1.0} | change))
