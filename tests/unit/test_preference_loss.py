"""preference_loss and preference_head against a naive truth in float64: one Python loop over the groups."""

import math

import pytest
import torch

from benchmarks.acceptance import plain_preference as truth
from rec_dist_kernels import completion_logps, preference_head, preference_loss

KINDS = ["sdpo", "dmpo"]


def ragged(seed, dtype=torch.float64, scale=3.0, sizes=(3, 2, 1, 5, 0, 9)):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    policy, reference = (torch.randn(2, sum(sizes), generator=generator, dtype=torch.float64) * scale).to(dtype)
    return policy, reference, offsets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_loss_rewards_and_gradient_are_the_formula(kind, offsets_dtype):
    policy, reference, offsets = ragged(0)
    expected_policy, policy = policy.clone().requires_grad_(), policy.requires_grad_()
    loss, rewards = preference_loss(policy, reference, offsets.to(offsets_dtype), kind=kind, beta=0.7)
    expected = truth(expected_policy, reference, offsets, kind, 0.7)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)  # weights that distinguish the groups
    (loss @ weights).backward()
    (expected @ weights).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(policy.grad, expected_policy.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(rewards, 0.7 * (policy.detach() - reference), rtol=0, atol=0)
    assert not rewards.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    policy, reference, offsets = ragged(1, scale=1.0)
    run = lambda p: preference_loss(p, reference, offsets, kind=kind, beta=0.5)[0]
    assert torch.autograd.gradcheck(run, (policy.requires_grad_(),))


def test_hand_computed():
    policy = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    reference = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)  # rewards 0, -1, -2
    offsets = torch.tensor([0, 3])
    sdpo, rewards = preference_loss(policy, reference, offsets, kind="sdpo", beta=1.0)
    dmpo, _ = preference_loss(policy, reference, offsets, kind="dmpo", beta=1.0)
    assert rewards.tolist() == [0, -1, -2]
    assert sdpo.item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)), rel=1e-14)  # 0.40760596
    assert sdpo.item() == pytest.approx(0.4076059644, abs=1e-10)
    assert dmpo.item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-14)
    assert dmpo.item() == pytest.approx(0.2014132780, abs=1e-10)


def test_one_negative_makes_all_kinds_equal():
    policy, reference, offsets = ragged(2, sizes=(2, 2, 2, 1))
    losses = [preference_loss(policy, reference, offsets, kind=k, beta=0.3)[0] for k in ("sdpo", "dmpo", "dpo")]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-14, atol=1e-15)
    assert torch.equal(losses[0], losses[2])
    assert losses[0][:3].min() > 0  # equal, but not because they are empty


@pytest.mark.parametrize("kind", KINDS)
def test_negatives_share_the_gradient_as_the_papers_say(kind):
    policy, reference, _ = ragged(3, sizes=(6,))
    policy.requires_grad_()
    loss, rewards = preference_loss(policy, reference, torch.tensor([0, 6]), kind=kind, beta=1.0)
    loss.sum().backward()
    share = policy.grad[1:] / -policy.grad[0]
    expected = torch.full((5,), 0.2, dtype=torch.float64) if kind == "dmpo" else rewards[1:].softmax(0)
    torch.testing.assert_close(share, expected, rtol=1e-12, atol=1e-14)
    assert policy.grad[0] < 0  # descending increases the positive's log-prob


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_rewards_stay_finite(kind, sign, dtype):
    policy = (sign * torch.tensor([1e4, -1e4, -1e4, 0.0, 1e4, -1e4], dtype=dtype)).requires_grad_()
    loss, rewards = preference_loss(policy, torch.zeros_like(policy), torch.tensor([0, 3, 6]), kind=kind, beta=1.0)
    loss.sum().backward()
    assert torch.isfinite(rewards).all()
    assert torch.isfinite(policy.grad).all()
    wrong_by_20000 = 0.0 if sign > 0 else 2e4 + (math.log(2) if kind == "sdpo" else 0)
    assert loss[0].item() == pytest.approx(wrong_by_20000, rel=1e-6)


def test_small_losses_keep_their_relative_precision():
    # log(1 + 2e-22) is lost where the positive is summed with its negatives: 1 + 2e-22 == 1.
    policy = torch.tensor([50.0, 0.0, 0.0])
    loss, _ = preference_loss(policy, torch.zeros(3), torch.tensor([0, 3]), kind="sdpo", beta=1.0)
    assert loss.item() == pytest.approx(2 * math.exp(-50), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_equal_rewards(kind):
    policy = torch.full((5,), -7.0, dtype=torch.float64)
    loss, rewards = preference_loss(policy, policy, torch.tensor([0, 5]), kind=kind, beta=2.0)
    assert loss.item() == pytest.approx(math.log(5) if kind == "sdpo" else math.log(2), rel=1e-14)
    assert rewards.abs().max() == 0


@pytest.mark.parametrize("kind", [*KINDS, "dpo"])
@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 1], [0, 0, 1, 1, 2]])
def test_groups_without_negatives_and_no_groups(kind, offsets):
    policy = torch.randn(offsets[-1], requires_grad=True)
    loss, rewards = preference_loss(policy, torch.zeros(offsets[-1]), torch.tensor(offsets), kind=kind, beta=1.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0] * (len(offsets) - 1)
    assert rewards.shape == policy.shape
    assert policy.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_no_worse_than_torch_in_the_same_dtype(kind, dtype):
    policy, reference, offsets = ragged(4, dtype)
    ours, theirs, exact = (policy.clone().requires_grad_() for _ in range(3))
    loss, rewards = preference_loss(ours, reference, offsets, kind=kind, beta=0.1)
    plain = truth(theirs, reference, offsets, kind, 0.1)
    expected = truth(exact.double(), reference.double(), offsets, kind, 0.1)
    for value in (loss, plain, expected):
        value.sum().backward()
    assert loss.dtype == rewards.dtype == torch.float32
    tolerance = 1e-6
    assert ((expected - loss).abs() <= (expected - plain).abs() + tolerance).all()
    # one rounding to the dtype of the logps is allowed: their gradient is stored in it
    rounding = torch.finfo(dtype).eps * exact.grad.abs() + tolerance
    assert ((exact.grad - ours.grad).abs() <= (exact.grad - theirs.grad).abs() + rounding).all()


def test_reference_log_probabilities_are_constants():
    policy, reference, offsets = ragged(5)
    reference.requires_grad_()
    preference_loss(policy.requires_grad_(), reference, offsets, beta=1.0)[0].sum().backward()
    assert reference.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ipo"}, "kind='ipo' is unknown"),
        ({"kind": "dpo"}, "takes 1 negative a group, got 2"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": math.nan}, "beta must be positive"),
        ({"policy_logps": torch.zeros(2)}, r"both have shape \(N,\)"),
        ({"policy_logps": torch.zeros(3, dtype=torch.int64)}, "must be floating"),
        ({"group_offsets": torch.tensor([0, 2])}, "must run from 0 to 3"),
        ({"group_offsets": torch.tensor([1, 3])}, "must run from 0 to 3"),
        ({"group_offsets": torch.tensor([0, 2, 1, 3])}, "must not decrease"),
        ({"group_offsets": torch.tensor([0.0, 3.0])}, "must be int32 or int64"),
        ({"group_offsets": torch.tensor(3)}, "must have shape"),
        ({"impl": "triton"}, 'preference_loss cannot run impl="triton": the tensors are on cpu'),
        ({"impl": "cuda"}, "impl='cuda' of preference_loss is unknown"),
    ],
)
def test_faults_are_named(change, message):
    arguments = {
        "policy_logps": torch.zeros(3),
        "reference_logps": torch.zeros(3),
        "group_offsets": torch.tensor([0, 3]),
        "beta": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        preference_loss(**(arguments | change))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_head_is_the_two_composed(kind, impl):
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(11, 4, generator=generator, dtype=torch.float64), torch.randn(11).double()
    rows, targets = torch.tensor([2, 3, 2, 2, 6, 7, 6, 8]), torch.tensor([1, 10, 4, 0, 2, 2, 9, 5])
    completions, groups = torch.tensor([0, 2, 3, 4, 6, 8]), torch.tensor([0, 3, 5])
    reference = torch.randn(5, generator=generator, dtype=torch.float64)
    ours, composed = (hidden.clone().requires_grad_() for _ in range(2))
    loss_sum, logps = preference_head(
        ours, weight, rows, targets, completions, reference, groups,
        kind=kind, beta=0.4, bias=bias, softcap=5.0, impl=impl,
    )  # fmt: skip
    expected_logps = completion_logps(composed, weight, rows, targets, completions, bias=bias, softcap=5.0)
    expected = truth(expected_logps, reference, groups, kind, 0.4).sum()
    loss_sum.backward()
    expected.backward()
    assert loss_sum.shape == ()
    assert not logps.requires_grad
    torch.testing.assert_close(logps, expected_logps.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(loss_sum, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(ours.grad, composed.grad, rtol=1e-12, atol=1e-14)
    assert ours.grad.abs().sum() > 0


HEAD = {
    "hidden": torch.zeros(3, 2),
    "weight": torch.zeros(5, 2),
    "rows": torch.tensor([0, 0, 2]),
    "targets": torch.tensor([4, 1, 0]),
    "completion_offsets": torch.tensor([0, 1, 3]),
    "reference_logps": torch.zeros(2),
    "group_offsets": torch.tensor([0, 2]),
    "kind": "sdpo",
    "beta": 1.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "triton"}, 'preference_head cannot run impl="triton": the tensors are on cpu'),
        ({"reference_logps": torch.zeros(3)}, r"reference_logps must have shape \(N,\) = \(2,\), got \(3,\)"),
        ({"group_offsets": torch.tensor([0, 3])}, "group_offsets must run from 0 to 2"),
        ({"group_weights": torch.ones(2)}, r"group_weights must have shape \(G,\) = \(1,\)"),
        ({"targets": torch.tensor([5, 1, 0])}, "targets must lie in 0..4"),
    ],
)
def test_head_faults_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        preference_head(**(HEAD | change))


@pytest.mark.parametrize("kind", KINDS)
def test_head_weighs_groups_and_weight_zero_is_exactly_nothing(kind):
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    rows, targets = torch.tensor([0, 1, 1, 2, 3, 4, 5]), torch.tensor([8, 0, 3, 3, 1, 2, 7])
    completions, groups = torch.arange(8), torch.tensor([0, 3, 5, 7])
    reference = torch.tensor([-1.0, -2.0, -3.0, torch.nan, -1.0, -4.0, -2.0], dtype=torch.float64)
    weights = torch.tensor([2.0, 0.0, 0.5])
    ours, composed = (hidden.clone().requires_grad_() for _ in range(2))
    arguments = (rows, targets, completions, reference, groups)
    loss_sum, logps = preference_head(ours, weight, *arguments, kind=kind, beta=0.4, group_weights=weights)
    losses = truth(completion_logps(composed, weight, rows, targets, completions), reference, groups, kind, 0.4)
    expected = 2 * losses[0] + 0.5 * losses[2]
    loss_sum.backward()
    expected.backward()
    torch.testing.assert_close(loss_sum, expected, rtol=1e-13, atol=1e-14)
    assert torch.isfinite(logps).all()
    assert ours.grad[2:4].abs().sum() == 0  # the rows of the group of weight 0; row 2 is its alone
    composed.grad[2:4] = 0  # NaN, from the reference of a group that was left out
    torch.testing.assert_close(ours.grad, composed.grad, rtol=1e-12, atol=1e-14)


def test_head_weights_of_groups_are_constants_of_any_dtype():
    hidden = HEAD["hidden"] + torch.arange(6.0).view(3, 2)
    weight = HEAD["weight"] + torch.linspace(-1, 1, 10).view(5, 2)
    groups = {"group_offsets": torch.tensor([0, 2, 2])}
    losses = []
    for dtype in (torch.float32, torch.float64, torch.int64):
        weights = torch.tensor([2.0, 1.0]).to(dtype).requires_grad_(dtype.is_floating_point)
        leaf = hidden.clone().requires_grad_()
        loss, _ = preference_head(**(HEAD | groups | {"hidden": leaf, "weight": weight, "group_weights": weights}))
        loss.backward()
        assert weights.grad is None
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert losses[0] > 0
    assert losses == [losses[0]] * 3
