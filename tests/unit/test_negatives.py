"""Negatives and candidates are pure functions of (seed, epoch, user, position).

They have the distribution that they claim, and do not depend on the target.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_dist.data.sampling.many_draws import SeenItems
from rec_dist.data.sampling.negatives import NegativeSampler, draw_candidates
from rec_dist.errors import UserError

COUNTS = np.arange(1, 41, dtype=np.int64)  # 40 items, item i was chosen i + 1 times


def items(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int32)


def sampler(**changes: Any) -> NegativeSampler:
    return NegativeSampler(**{"kind": "uniform", "num": 3, "seed": 5, "train_counts": COUNTS, **changes})


def draw(source: NegativeSampler, **changes: Any) -> list[int]:
    return source.draw(
        **{"epoch": 0, "user": 1, "position": 2, "seen": items(0, 1), "explicit_negatives": items(), **changes}
    ).tolist()


def candidates(**changes: Any) -> list[int]:
    base = {"seed": 3, "user": 1, "position": 4, "target": 9, "history": items(1, 2), "num": 10, "num_items": 40}
    return draw_candidates(**{**base, **changes}).tolist()


def assert_distribution(counts: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square within 5 standard deviations of its mean: by chance 1 run in a million fails, and the draws are fixed anyway."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom), statistic


@pytest.mark.parametrize("kind", ["uniform", "popularity", "low_rated"])
@settings(max_examples=50, deadline=None)
@given(
    seen=st.sets(st.integers(0, 39), max_size=30),
    explicit_negatives=st.sets(st.integers(0, 39), max_size=8),
    num=st.integers(0, 10),
)
def test_negatives_are_distinct_items_outside_what_was_seen(
    kind: str, seen: set[int], explicit_negatives: set[int], num: int
) -> None:
    found = draw(sampler(kind=kind, num=num), seen=items(*seen), explicit_negatives=items(*explicit_negatives))
    assert len(set(found)) == len(found) == num
    assert set(found) <= set(range(40)) - seen


@pytest.mark.parametrize("kind", ["uniform", "popularity", "low_rated"])
def test_a_draw_is_a_function_of_seed_epoch_user_and_position_alone(kind: str) -> None:
    source, explicit_negatives = sampler(kind=kind), items(*range(4, 30))
    first = draw(source, explicit_negatives=explicit_negatives)
    assert draw(sampler(kind=kind), explicit_negatives=explicit_negatives) == first
    draw(source, user=99)  # no state is left behind
    assert draw(source, explicit_negatives=explicit_negatives) == first
    assert draw(source, explicit_negatives=explicit_negatives, seen=items(1, 0)) == first
    for change in ({"epoch": 1}, {"user": 2}, {"position": 3}):
        assert draw(source, explicit_negatives=explicit_negatives, **change) != first
    assert draw(sampler(kind=kind, seed=6), explicit_negatives=explicit_negatives) != first


def test_uniform_negatives_are_uniform_over_what_is_left() -> None:
    source, counts = sampler(num=2), np.zeros(40)
    for user in range(6000):
        counts[draw(source, user=user)] += 1
    assert not counts[:2].any()
    assert_distribution(counts[2:], np.full(38, 6000 * 2 / 38))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_popularity_negatives_follow_train_count_to_the_power(power: float) -> None:
    source, counts = sampler(kind="popularity", num=1, power=power), np.zeros(40)
    for user in range(8000):
        counts[draw(source, user=user)] += 1
    weights = np.where(np.arange(40) < 2, 0, COUNTS.astype(float) ** power)
    assert_distribution(counts[2:], (8000 * weights / weights.sum())[2:])


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_crowded_catalogue_is_drawn_from_with_the_same_weights(power: float) -> None:
    """With more than half blocked, another algorithm draws over an order of all items; it must agree."""
    source, counts, seen = sampler(kind="popularity", num=1, power=power), np.zeros(40), items(*range(30))
    for user in range(6000):
        counts[draw(source, user=user, seen=seen)] += 1
    weights = np.where(np.arange(40) < 30, 0, COUNTS.astype(float) ** power)
    assert not counts[:30].any()
    assert_distribution(counts[30:], (6000 * weights / weights.sum())[30:])


def test_low_rated_takes_explicit_negatives_first_and_then_uniform_ones() -> None:
    explicit_negatives = items(7, 8, 9)
    assert set(draw(sampler(kind="low_rated", num=2), explicit_negatives=explicit_negatives)) < {7, 8, 9}
    found = draw(sampler(kind="low_rated", num=6), explicit_negatives=explicit_negatives, seen=items(8))
    assert set(found[:2]) == {7, 9}  # an item that was seen is not drawn as an explicit negative, and uniform ones follow
    assert not set(found[2:]) & {7, 8, 9}
    first = [draw(sampler(kind="low_rated", num=1), explicit_negatives=explicit_negatives, user=user)[0] for user in range(3000)]
    assert_distribution(np.bincount(first, minlength=10)[7:], np.full(3, 1000.0))


def test_the_last_negatives_of_a_catalogue_can_be_drawn_and_no_more() -> None:
    assert set(draw(sampler(num=38))) == set(range(2, 40))
    with pytest.raises(UserError, match=r"negatives\.num asks for 39 .*only 38 left \(user 1, position 2\)"):
        draw(sampler(num=39))
    with pytest.raises(UserError, match=r"evaluate\.num_candidates.*\(user 1, position 4\)"):
        candidates(num=39)
    assert set(candidates(num=38)) == set(range(40)) - {1, 2}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 1000), st.sets(st.integers(0, 39), max_size=15), st.integers(2, 20))
def test_candidates_are_the_target_once_and_items_outside_the_history(user: int, position: int, past: set[int], num: int) -> None:
    found = candidates(user=user, position=position, history=items(*sorted(past - {9})), num=num)
    assert found.count(9) == 1
    assert len(set(found)) == len(found) == num
    assert not set(found) & (past - {9})


def test_the_target_has_no_say_in_the_other_candidates() -> None:
    """S-DPO's released lists were seeded by the target: there, the candidates reveal which of them it is."""
    free = [item for item in range(40) if item not in (1, 2)]
    lists = {target: [item for item in candidates(target=target) if item != target] for target in free}
    never_drawn = next(item for item in free if all(item not in found for found in lists.values()))
    common = lists[never_drawn]
    for target, found in lists.items():
        left = [item for item in common if item != target]
        assert found[: len(left)] == left  # the same draw, but that a target is left out and the next in line moves up


def test_the_target_stands_anywhere_with_equal_chance() -> None:
    places = [candidates(user=user).index(9) for user in range(5000)]
    assert_distribution(np.bincount(places, minlength=10), np.full(10, 500.0))


def test_the_other_candidates_are_uniform_and_in_no_order() -> None:
    counts, first_is_less = np.zeros(40), 0
    for user in range(3000):
        found = [item for item in candidates(user=user, num=5) if item != 9]
        counts[found] += 1
        first_is_less += found[0] < found[1]
    assert_distribution(np.delete(counts, [1, 2, 9]), np.full(37, 3000 * 4 / 37))
    assert 1350 < first_is_less < 1650


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_items_held_out_are_no_negatives_drawn_one_by_one_or_together(kind: str) -> None:
    held = items(*range(5, 15))
    source = sampler(kind=kind, held_out=held)
    row = np.asarray([0, 1, 2, 3], dtype=np.int32)
    seen = SeenItems(row, np.asarray([0, 4]), 40)
    users = np.arange(300)
    many = source.draw_many(
        epochs=np.zeros(300, dtype=np.int64),
        users=users,
        positions=np.full(300, 3),
        seen=seen,
        rows=np.zeros(300, dtype=np.int64),
        counts=np.full(300, 4),
    )
    assert not np.isin(many, [*held, *row]).any() and len(np.unique(many)) == 26
    assert many.tolist() == [draw(source, user=user, position=3, seen=row) for user in users.tolist()]
