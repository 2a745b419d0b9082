"""Sums and counts: the contribution of a group does not depend on its micro-batch, and a dummy group contributes nothing."""

import math

import pytest
import torch

from rec_dist.losses import likelihood_sums, preference_sums, reward_metrics
from rec_dist_kernels import preference_loss

NAMES = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}


def micro_batch(seed=0, sizes=(3, 2, 5)):
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, sum(sizes), generator=generator, dtype=torch.float64)
    return policy, reference, torch.tensor([0, *sizes]).cumsum(0)


def test_reward_metrics_by_hand():
    # group 1: chosen 2, rejected 1 and 3; group 2: chosen 0, rejected 0 (a tie) -> no win; group 3: no negative
    rewards, offsets = torch.tensor([2.0, 1.0, 3.0, 0.0, 0.0, 9.0]), torch.tensor([0, 3, 5, 6])
    metrics, count = reward_metrics(rewards, offsets)
    assert count.item() == 2
    assert {name: value.item() for name, value in metrics.items()} == {
        "rewards/chosen": 2.0,
        "rewards/rejected": 2.0,
        "rewards/margins": 0.0,
        "rewards/accuracies": 0.5,
    }


def test_group_weights_by_hand():
    rewards, offsets = torch.tensor([2.0, 1.0, 3.0, 0.0, -4.0]), torch.tensor([0, 3, 5])
    metrics, count = reward_metrics(rewards, offsets, group_weights=torch.tensor([3.0, 0.5]))
    assert count.item() == 3.5
    assert metrics["rewards/chosen"].item() == 6.0
    assert metrics["rewards/rejected"].item() == 6.0 - 2.0
    assert metrics["rewards/margins"].item() == 2.0
    assert metrics["rewards/accuracies"].item() == 1.5 + 0.5


@pytest.mark.parametrize("kind", ["sdpo", "dmpo"])
def test_preference_sums_are_the_kernels_sums(kind):
    policy, reference, offsets = micro_batch()
    sums = preference_sums(policy.requires_grad_(), reference, offsets, kind=kind, beta=0.5)
    loss, _ = preference_loss(policy, reference, offsets, kind=kind, beta=0.5)
    assert sums.count.item() == 3
    assert sums.loss_sum.item() == pytest.approx(loss.sum().item(), rel=1e-14)
    assert sums.metrics.keys() == NAMES
    assert sums.loss_sum.requires_grad
    assert not any(value.requires_grad for value in (sums.count, *sums.metrics.values()))


@pytest.mark.parametrize("kind", ["sdpo", "dmpo"])
def test_packing_does_not_change_sums(kind):
    policy, reference, offsets = micro_batch()
    whole = preference_sums(policy, reference, offsets, kind=kind, beta=0.5)
    cut = int(offsets[1])
    parts = [
        preference_sums(policy[:cut], reference[:cut], offsets[:2], kind=kind, beta=0.5),
        preference_sums(policy[cut:], reference[cut:], offsets[1:] - cut, kind=kind, beta=0.5),
    ]
    assert sum(part.loss_sum.item() for part in parts) == pytest.approx(whole.loss_sum.item(), rel=1e-14)
    assert sum(part.count.item() for part in parts) == whole.count.item()
    for name in NAMES:
        joined = sum(part.metrics[name].item() for part in parts)
        assert joined == pytest.approx(whole.metrics[name].item(), rel=1e-13)


@pytest.mark.parametrize("kind", ["sdpo", "dmpo"])
@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf, -math.inf])
def test_a_group_of_weight_zero_contributes_exactly_nothing(kind, poison):
    policy, reference, offsets = micro_batch()
    alone = policy.clone().requires_grad_()
    expected = preference_sums(alone, reference, offsets, kind=kind, beta=0.5)
    expected.loss_sum.backward()
    leaf = torch.cat([policy, torch.full((2,), poison)]).requires_grad_()
    sums = preference_sums(
        leaf,
        torch.cat([reference, torch.full((2,), poison)]),
        torch.cat([offsets, offsets[-1:] + 2]),
        kind=kind,
        beta=0.5,
        group_weights=torch.tensor([1.0, 1.0, 1.0, 0.0]),
    )
    sums.loss_sum.backward()
    assert sums.loss_sum.item() == expected.loss_sum.item()
    assert sums.count.item() == 3
    assert torch.equal(leaf.grad, torch.cat([alone.grad, torch.zeros(2)]))
    for name in NAMES:
        assert sums.metrics[name].item() == expected.metrics[name].item()


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 1], [0, 2]])
def test_an_empty_micro_batch_is_zero_and_runs_backward(offsets):
    policy = torch.full((offsets[-1],), math.nan, requires_grad=True)
    weights = torch.zeros(len(offsets) - 1)
    sums = preference_sums(policy, policy.detach(), torch.tensor(offsets), kind="sdpo", beta=1.0, group_weights=weights)
    sums.loss_sum.backward()
    assert [value.item() for value in (sums.loss_sum, sums.count, *sums.metrics.values())] == [0.0] * 6
    assert policy.grad.abs().sum().item() == 0


def test_groups_without_negatives_do_not_dilute_the_mean():
    policy, reference, offsets = micro_batch(sizes=(3, 1, 1, 2))
    sums = preference_sums(policy, reference, offsets, kind="dmpo", beta=1.0)
    assert sums.count.item() == 2


def test_likelihood_by_hand():
    logps = torch.tensor([-3.0, 0.0, -5.0], requires_grad=True)
    sums = likelihood_sums(logps, torch.tensor([0, 2, 2, 6]))
    assert (sums.loss_sum.item(), sums.count.item(), sums.metrics) == (8.0, 6.0, {})
    weighted = likelihood_sums(logps, torch.tensor([0, 2, 2, 6]), group_weights=torch.tensor([2.0, 1.0, 0.5]))
    assert (weighted.loss_sum.item(), weighted.count.item()) == (8.5, 6.0)
    weighted.loss_sum.backward()
    assert logps.grad.tolist() == [-2.0, -1.0, -0.5]


def test_likelihood_of_a_dummy_is_nothing():
    logps = torch.tensor([-3.0, math.nan], requires_grad=True)
    sums = likelihood_sums(logps, torch.tensor([0, 2, 3]), group_weights=torch.tensor([1.0, 0.0]))
    sums.loss_sum.backward()
    assert (sums.loss_sum.item(), sums.count.item()) == (3.0, 2.0)
    assert logps.grad.tolist() == [-1.0, 0.0]
    assert likelihood_sums(torch.zeros(0), torch.tensor([0])).count.item() == 0


def test_bfloat16_is_summed_in_float32():
    logps = torch.full((3000,), -1.0, dtype=torch.bfloat16)  # a bfloat16 sum stops at 256
    assert likelihood_sums(logps, torch.arange(3001)).loss_sum.item() == 3000


def test_faults_are_named():
    policy, reference, offsets = micro_batch()
    with pytest.raises(ValueError, match=r"group_weights must have shape \(G,\) = \(3,\)"):
        preference_sums(policy, reference, offsets, kind="sdpo", beta=1.0, group_weights=torch.ones(4))
    with pytest.raises(ValueError, match=r"both have shape \(N,\)"):
        preference_sums(policy, reference[1:], offsets, kind="sdpo", beta=1.0)
    with pytest.raises(ValueError, match="group_offsets must run from 0 to 10"):
        preference_sums(policy, reference, offsets[:-1], kind="sdpo", beta=1.0)
    with pytest.raises(ValueError, match=r"logps must have shape \(N,\) = \(3,\)"):
        likelihood_sums(policy, offsets)
