"""Times of steps become shares, rates and percentiles, worked out by hand; and two reports are compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from rec_dist.commands.profile import compare, differing_settings, faults, read_profile
from rec_dist.errors import UserError
from rec_dist.profiling.phases import PHASES, Clock, StepTime, TimedEngine, lag, percentile, shares, speed
from rec_dist.profiling.trace import covered_seconds


def step(seconds: float, **phases: float) -> StepTime:
    return StepTime(seconds, {**dict.fromkeys(PHASES, 0.0), **phases}, tokens=100, logical_tokens=400, groups=5)


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([1.0, 2.0], 95) == pytest.approx(1.95)
    assert percentile([float(value) for value in range(101)], 95) == pytest.approx(95.0)
    assert percentile([7.0], 95) == 7.0


def test_shares_are_of_all_seconds_and_add_up() -> None:
    found = shares([step(1.0, forward=0.5, data=0.1), step(3.0, forward=1.5, backward=1.0)])
    assert found["forward"] == pytest.approx(0.5) and found["data"] == pytest.approx(0.025)
    assert found["backward"] == pytest.approx(0.25) and found["other"] == pytest.approx(0.225)
    assert sum(found.values()) == pytest.approx(1.0)
    assert set(found) == {*PHASES, "other"}


def test_phases_that_sum_to_more_than_the_step_are_scaled() -> None:
    found = shares([step(1.0, forward=0.6, backward=0.6)])
    assert found["forward"] == pytest.approx(0.5) and found["other"] == 0.0


def test_a_step_lasts_as_long_as_on_its_slowest_rank() -> None:
    found = speed([[step(1.0), step(1.0)], [step(3.0), step(1.0)]])
    assert found["steps"] == 2 and found["step_seconds"] == {"p50": 2.0, "p95": pytest.approx(2.9), "mean": 2.0}
    assert (found["tokens"], found["logical_tokens"], found["groups"]) == (200, 800, 10)  # of the plan, once, not once a rank
    assert found["tokens_per_second"] == 50.0 and found["groups_per_second"] == 2.5


def test_the_slowest_rank_is_the_one_that_comes_last_to_the_reduction() -> None:
    fast, slow = step(2.0, forward=0.5, backward=0.5, reduce=0.9), step(2.0, forward=0.8, backward=1.0, reduce=0.1)
    found = lag([[fast], [slow], [fast]])
    assert found["slowest_rank"] == 1
    assert found["lag_seconds"] == pytest.approx(0.8) and found["lag_share"] == pytest.approx(0.4)
    assert lag([[fast]])["lag_seconds"] == 0.0


def test_the_clock_adds_up_what_is_entered_often() -> None:
    clock = Clock("cpu")
    for _ in range(3):
        with clock.phase("forward"):
            pass
    clock.begin("reduce")
    clock.end("reduce")
    first = clock.take()
    assert first["forward"] > 0 and first["reduce"] > 0 and first["backward"] == 0.0
    assert clock.take() == dict.fromkeys(PHASES, 0.0)


class Recorder:
    """An engine that only records what it was asked to do."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def forward(self, batch: Any) -> Any:
        self.calls.append(("forward", batch))
        return batch

    def backward(self, loss: Any, *, last: bool) -> None:
        self.calls.append(("backward", loss, last))

    def step(self, lr: float, *, discard: bool = False) -> float:
        self.calls.append(("step", lr, discard))
        return 1.5


def test_the_engines_methods_are_passed_on() -> None:
    engine, clock = Recorder(), Clock("cpu")
    timed: Any = TimedEngine(engine, clock)
    assert timed.forward(1) == 1
    timed.backward(2, last=False)
    timed.backward(3, last=True)
    assert timed.step(0.25) == 1.5
    assert engine.calls == [("forward", 1), ("backward", 2, False), ("backward", 3, True), ("step", 0.25, False)]
    taken = clock.take()
    assert all(taken[phase] > 0 for phase in ("forward", "backward", "reduce", "optimizer"))


def test_time_under_collectives_counts_once() -> None:
    assert covered_seconds([]) == 0.0
    assert covered_seconds([(5e6, 6e6), (0, 2e6), (1e6, 3e6), (1.5e6, 1.6e6)]) == pytest.approx(4.0)


def report(tokens: float, p50: float, **settings: Any) -> dict[str, Any]:
    return {"real": {"tokens_per_second": tokens, "step_seconds": {"p50": p50}}, "settings": settings}


@pytest.mark.parametrize(
    ("tokens", "p50", "slower"),
    [
        (100.0, 1.0, []),
        (200.0, 0.5, []),
        (95.1, 1.049, []),
        (94.9, 1.0, ["tokens/s"]),
        (100.0, 1.051, ["median"]),
        (50.0, 2.0, ["tokens/s", "median"]),
    ],
)
def test_slower_by_more_than_the_tolerance(tokens: float, p50: float, slower: list[str]) -> None:
    lines, found = compare(report(100.0, 1.0), report(tokens, p50), 0.05)
    assert len(lines) == 2 and len(found) == len(slower)
    assert all(word in text for word, text in zip(slower, found, strict=True))


def test_settings_that_differ_are_named() -> None:
    assert differing_settings(report(1, 1, device="a", workers=2), report(1, 1, device="b", workers=2)) == [
        "WARNING: device was a and is b"
    ]


def test_compiling_after_the_warm_up_is_a_fault() -> None:
    assert faults({"recompilations_after_warmup": 0}) == []
    assert "profile.warmup_steps" in faults({"recompilations_after_warmup": 2})[0]


def test_only_a_profile_is_compared_with(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    for text in ("", "[]", "{}", json.dumps({"real": {"tokens_per_second": 1}})):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"--against .*old\.json"):
            read_profile(path)
    path.write_text(json.dumps({"format": 1, **report(1.0, 1.0)}), encoding="utf-8")
    assert read_profile(path)["real"]["tokens_per_second"] == 1.0
