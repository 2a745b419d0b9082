"""The plan of a run: what is trained on does not depend on the workers that train it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_dist.data.sampling.global_batches import GlobalBatchSampler, assign_to_ranks, pack_by_tokens, pack_evenly

WINDOWS = st.none() | st.integers(1, 70)
ORDERS = st.builds(
    GlobalBatchSampler,
    st.integers(1, 60),
    st.integers(1, 25),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.none(),
    window=WINDOWS,
)
LENGTHS = st.lists(st.integers(1, 30), max_size=40).map(lambda values: np.asarray(values, dtype=np.int64))


@settings(max_examples=100, deadline=None)
@given(ORDERS)
def test_every_example_comes_once_an_epoch_and_none_is_dropped(order: GlobalBatchSampler) -> None:
    steps = [order.examples_of_step(step) for step in range(order.num_steps)]
    examples, epochs = (np.concatenate(column) for column in zip(*steps, strict=True))
    assert epochs.tolist() == sorted(epochs.tolist())
    for epoch in range(order.epochs):
        assert sorted(examples[epochs == epoch].tolist()) == list(range(order.num_examples))
    assert all(len(found) == order.examples_per_step for found, _ in steps[:-1])
    assert len(order.examples_of_step(order.num_steps)[0]) == 0


@settings(max_examples=50, deadline=None)
@given(ORDERS, st.integers(1, 25))
def test_another_batch_size_cuts_the_same_order_elsewhere(order: GlobalBatchSampler, examples_per_step: int) -> None:
    other = replace(order, examples_per_step=examples_per_step)
    whole = lambda o: np.concatenate([o.examples_of_step(step)[0] for step in range(o.num_steps)]).tolist()
    assert whole(order) == whole(other)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = (GlobalBatchSampler(50, 50, 2, seed=1).examples_of_step(step)[0].tolist() for step in (0, 1))
    other = GlobalBatchSampler(50, 50, 2, seed=2).examples_of_step(0)[0].tolist()
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(50))}) == 4


@settings(max_examples=50, deadline=None)
@given(st.integers(40, 4000), st.integers(1, 400), st.integers(0, 2**31))
def test_a_window_draws_from_few_places_and_mixes_them(num_examples: int, window: int, seed: int) -> None:
    order = GlobalBatchSampler(num_examples, 10**6, 2, seed, window=window)
    examples, epochs = order.examples_of_step(0)
    for epoch in (0, 1):
        own = examples[epochs == epoch]
        assert sorted(own.tolist()) == list(range(num_examples))
        if window >= num_examples:
            continue
        for start in range(0, num_examples, window):
            places = np.sort(own[start : start + window])
            runs = 1 + int((np.diff(places) > 1).sum())
            assert runs <= 16 * 2 + 2, "runs of a sixteenth of a window, of which two may be cut at its ends"


def test_windows_are_shuffled_inside_and_among_themselves() -> None:
    (examples, _), (later, _) = (GlobalBatchSampler(10_000, 10_000, 2, 5, window=1600).examples_of_step(step) for step in (0, 1))
    assert abs(np.corrcoef(examples[:1600], np.arange(1600))[0, 1]) < 0.1
    assert np.abs(np.corrcoef(np.argsort(examples), np.argsort(later))[0, 1]) < 0.5
    firsts = [examples[start : start + 1600].mean() for start in range(0, 10_000 - 1600, 1600)]
    assert firsts != sorted(firsts)
    assert len(set(examples[:1600].tolist()) & set(later[:1600].tolist())) < 800


@pytest.mark.parametrize(("max_steps", "expected"), [(None, 7), (3, 3), (100, 7)])
def test_max_steps_ends_a_run_within_its_epochs(max_steps: int | None, expected: int) -> None:
    assert GlobalBatchSampler(10, 3, 2, seed=0, max_steps=max_steps).num_steps == expected


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(30, 90))
def test_micro_batches_hold_every_item_once_within_the_capacity(lengths: np.ndarray, capacity: int) -> None:
    micro_batches = pack_by_tokens(lengths, capacity)
    assert sorted(item for micro_batch in micro_batches for item in micro_batch) == list(range(len(lengths)))
    sizes = [int(lengths[micro_batch].sum()) for micro_batch in micro_batches]
    assert all(0 < size <= capacity for size in sizes)
    # Best fit opens a micro-batch only when an item fits none, so that two micro-batches never fit into one.
    assert sum(2 * size <= capacity for size in sizes) <= 1
    assert micro_batches == pack_by_tokens(lengths.copy(), capacity)


def test_best_fit_fills_the_tightest_micro_batch() -> None:
    # 8 | 6, 5 leave 4 and 1: the last 1 goes to the second micro-batch, where first fit would take the first.
    assert pack_by_tokens(np.asarray([1, 8, 6, 5]), 12) == [[1], [2, 3, 0]]
    with pytest.raises(AssertionError, match="longer than a micro-batch"):
        pack_by_tokens(np.asarray([11]), 10)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_assigning_covers_all_and_every_rank_runs_the_same_number(lengths: np.ndarray, world_size: int) -> None:
    micro_batches = pack_by_tokens(lengths, 40)
    ranks = assign_to_ranks(micro_batches, lengths, world_size)
    assert len(ranks) == world_size
    assert {len(assigned) for assigned in ranks} == {-(-len(micro_batches) // world_size)}
    assigned = sorted(tuple(micro_batch) for rank in ranks for micro_batch in rank if micro_batch)
    assert assigned == sorted(tuple(sorted(micro_batch)) for micro_batch in micro_batches)


def test_assigning_balances_the_work() -> None:
    lengths = np.asarray([10, 9, 2, 1, 8, 1])
    ranks = assign_to_ranks([[i] for i in range(6)], lengths, 2)
    # 10 | 9; then 8 to the lighter second rank, 2 and 1 to the first, which has its three micro-batches then.
    assert ranks == [[[0], [2], [3]], [[1], [4], [5]]]


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 5))
def test_even_micro_batches_hold_every_item_once_within_the_capacity(sizes: list[int], world_size: int) -> None:
    lengths = np.asarray(sizes, dtype=np.int64)
    micro_batches = pack_evenly(lengths, 40, world_size)
    assert sorted(item for micro_batch in micro_batches for item in micro_batch) == list(range(len(lengths)))
    assert all(0 < lengths[micro_batch].sum() <= 40 for micro_batch in micro_batches)
    fewest = len(pack_by_tokens(lengths, 40))
    assert fewest <= len(micro_batches) <= -(-fewest // world_size) * world_size


def test_even_micro_batches_leave_no_rank_waiting_for_a_full_one() -> None:
    lengths = np.asarray([100] * 12)
    assert [len(micro_batch) for micro_batch in pack_by_tokens(lengths, 1000)] == [10, 2]
    assert [len(micro_batch) for micro_batch in pack_evenly(lengths, 1000, 2)] == [6, 6]
    # one micro-batch would leave a rank idle
    assert [len(micro_batch) for micro_batch in pack_evenly(np.asarray([10] * 4), 1000, 2)] == [2, 2]


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(30, 90), st.integers(1, 4))
def test_micro_batches_are_those_of_the_rules_in_words(lengths: np.ndarray, capacity: int, world_size: int) -> None:
    """Longest first, into the fullest micro-batch that has space, or into the emptiest of all; ties go to the earlier one."""
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    tight: list[list[int]] = []
    space: list[int] = []
    for item in order:
        fits = [micro_batch for micro_batch in range(len(tight)) if space[micro_batch] >= lengths[item]]
        micro_batch = min(fits, key=lambda p: (space[p], p), default=len(tight))
        if micro_batch == len(tight):
            tight.append([])
            space.append(capacity)
        tight[micro_batch].append(item)
        space[micro_batch] -= int(lengths[item])
    assert pack_by_tokens(lengths, capacity) == tight
    count = min(-(-len(tight) // world_size) * world_size, len(lengths))
    even: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    for item in order:
        micro_batch = min(range(count), key=lambda p: (used[p], p))
        even[micro_batch].append(item)
        used[micro_batch] += int(lengths[item])
    assert pack_evenly(lengths, capacity, world_size) == (even if max(used, default=0) <= capacity else tight)
