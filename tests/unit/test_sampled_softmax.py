"""The sampled softmax: draws are a function of (seed, step), and its gradient approaches the full one."""

import numpy as np
import pytest
import torch

from rec_dist.data.sampling.item_sampler import ItemSampler
from rec_dist.methods.sequential.next_item import NextItem, build_recommender
from rec_dist.methods.sequential.sequences import lay_out

NUM_ITEMS = 50
COUNTS = (1000 / np.arange(1, NUM_ITEMS + 1) ** 1.2).astype(np.int64)


def objective() -> NextItem:
    torch.manual_seed(0)
    values = {"num_items": NUM_ITEMS, "width": 8, "state_width": 8, "num_layers": 1, "dropout": 0.0, "max_length": 9}
    return NextItem(build_recommender("gru4rec", values)).double()


def batch():
    rng = np.random.default_rng(0)
    return lay_out([rng.integers(0, NUM_ITEMS, n).astype(np.int32) for n in (9, 4)], [np.asarray([0, 3, 40], dtype=np.int32)] * 2)


def gradient(module: NextItem, example) -> torch.Tensor:
    module.zero_grad()
    module(example)[0].backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def test_draws_are_a_function_of_seed_and_step():
    one, same, other = (ItemSampler(64, seed, COUNTS) for seed in (0, 0, 1))
    assert np.array_equal(one.draw(7)[0], same.draw(7)[0])
    assert not np.array_equal(one.draw(7)[0], one.draw(8)[0])
    assert not np.array_equal(one.draw(7)[0], other.draw(7)[0])


def test_draws_follow_the_counts_and_say_so():
    sampler = ItemSampler(200_000, 0, COUNTS)
    items, log_expected = sampler.draw(0)
    seen = np.bincount(items, minlength=NUM_ITEMS)
    expected = np.zeros(NUM_ITEMS)
    expected[items] = np.exp(log_expected)
    np.testing.assert_allclose(expected, 200_000 * (COUNTS + 1) / (COUNTS + 1).sum(), rtol=1e-9)
    assert np.abs(seen - expected).max() < 5 * np.sqrt(expected.max())


def test_an_item_without_training_rows_is_drawn_too():
    items, log_expected = ItemSampler(1000, 0, np.zeros(4, dtype=np.int64)).draw(0)
    assert set(items.tolist()) == {0, 1, 2, 3}
    assert log_expected == pytest.approx(np.log(250.0))


def test_the_gradient_approaches_the_full_one():
    module = objective()
    with torch.no_grad():
        module.model.item_embedding.weight *= 3  # a softmax that is not flat, so that a missing correction shows
    full = gradient(module, batch())
    errors = []
    for num in (10, 100, 1000):
        sampler = ItemSampler(num, 0, COUNTS)
        draws = [gradient(module, batch().with_negatives(*sampler.draw(step))) for step in range(100)]
        errors.append(float((torch.stack(draws).mean(dim=0) - full).norm() / full.norm()))
    assert errors[0] > errors[1] > errors[2], errors
    assert errors[2] < 0.02, errors  # the noise of 100 draws of 1000 alone is about 0.01
    uncorrected = batch().with_negatives(*ItemSampler(20_000, 0, COUNTS).draw(0))
    uncorrected.log_expected.fill_(np.log(20_000 / NUM_ITEMS))
    assert (gradient(module, uncorrected) - full).norm() / full.norm() > 0.1, "the test would not notice a missing correction"


def test_the_target_is_counted_once_however_often_it_is_drawn():
    module, example = objective(), batch()
    only = example.with_negatives(np.zeros(5, dtype=np.int64), np.zeros(5))
    logps = module(only)[2]
    assert logps[example.targets == 0].tolist() == [0.0, 0.0]  # no other item was drawn: the target is certain
    assert (logps[example.targets != 0] < 0).all()
