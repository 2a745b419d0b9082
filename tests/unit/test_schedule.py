"""The learning rate at the steps where an off-by-one would show: first, end of warm-up, last."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_dist.training.schedule import Schedule, learning_rate


def rates(schedule: Schedule, warmup: int, total: int) -> list[float]:
    return [learning_rate(s, peak=2.0, warmup_steps=warmup, total_steps=total, schedule=schedule) for s in range(total)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2 / 3, 4 / 3, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [2 / 3, 4 / 3, 2.0, 2.0, 1.5, 1.0, 0.5]),
        ("cosine", [2 / 3, 4 / 3, 2.0, *(1 + math.cos(math.pi * x) for x in (0, 0.25, 0.5, 0.75))]),
    ],
)
def test_by_hand(schedule: Schedule, expected: list[float]) -> None:
    assert rates(schedule, 3, 7) == pytest.approx(expected, rel=1e-12)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 20), st.integers(1, 60))
def test_every_step_trains_and_none_is_above_the_peak(schedule: Schedule, warmup: int, total: int) -> None:
    found = rates(schedule, warmup, total)
    assert all(0 < rate <= 2.0 for rate in found)
    rising = found[: min(warmup, total)]
    assert rising == sorted(rising)
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    if warmup < total:
        assert found[warmup] == 2.0
