"""What a person sees while a run trains: lines in a log, a bar on a terminal, and the time left as `rec-dist status` shows it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rec_dist.commands.progress import watching
from rec_dist.commands.status import status_of
from rec_dist.runtime.duration import Remaining, duration
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.training.recorder import StepRecorder
from rec_dist.training.trackers import Trackers

TOTAL = 100
Record = Callable[[dict[str, Any]], None]


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.claim({}, "{}\n")
    return run


@pytest.fixture
def record(run: RunDirectory) -> Record:
    made = StepRecorder(run, Trackers([], run.log), TOTAL, 1000, lambda tokens, scored, seconds: None)
    return lambda row: made.record(row) if row["event"] == "step" else made.bad_step(row)


def row(step: int, seconds: float) -> dict[str, Any]:
    return {"event": "step", "step": step, "loss": 5.9, "tokens_per_second": 13122.4, "step_seconds": seconds}


def shown(run: RunDirectory, out: io.StringIO, do: Callable[[], None]) -> str:
    """What stands on `out` after it has seen the events of `do`."""
    with watching(run, out):
        do()
    return out.getvalue()


def test_a_line_says_how_long_it_will_be(run: RunDirectory, record: Record) -> None:
    """By hand: the first step of 90 s is left out; the median of 1, 2 and 9 s is 2 s; 96 steps are left: 192 s."""

    def train() -> None:
        for step, seconds in enumerate((90.0, 1.0, 9.0, 2.0), start=1):
            record(row(step, seconds))

    assert shown(run, io.StringIO(), train).splitlines()[-1] == "train 4/100  loss 5.9000, 13122 tokens/s, 3 min 12 s left"
    with run.locked():
        assert status_of(run.path).eta == pytest.approx(192)


@pytest.mark.parametrize("step", [1, TOTAL])
def test_the_first_step_and_the_last_one_promise_nothing(run: RunDirectory, record: Record, step: int) -> None:
    def train() -> None:
        for number in range(1, step + 1):
            record(row(number, 1.0))

    assert shown(run, io.StringIO(), train).splitlines()[-1] == f"train {step}/100  loss 5.9000, 13122 tokens/s"


def test_a_step_that_is_left_out_moves_the_rest(run: RunDirectory, record: Record) -> None:
    def train() -> None:
        record(row(1, 1.0))
        record(row(2, 2.0))
        bad = {"loss": "nan", "grad_norm": "nan", "users": [17], "num_users": 1}
        record({"event": "bad_step", "step": 3, **bad})

    assert shown(run, io.StringIO(), train).splitlines()[-1] == "train 3/100  left out, 3 min 14 s left"


def test_the_bar_of_a_resumed_run_goes_by_its_own_steps(run: RunDirectory, record: Record) -> None:
    """tqdm would count the 50 earlier steps as instant and expect the rest in a matter of seconds."""

    def train() -> None:
        record(row(51, 60.0))
        record(row(52, 60.0))

    bar = shown(run, Terminal(), train).strip().rpartition("\r")[2]
    assert "52/100" in bar and "48 min left" in bar
    assert "it/s" not in bar and "?" not in bar


def test_other_phases_have_no_rest_of_ours(run: RunDirectory) -> None:
    assert shown(run, io.StringIO(), lambda: run.progress("reference", 3, 10)) == "reference 3/10\n"


def test_the_newest_twenty_steps_count() -> None:
    remaining = Remaining(1000)
    for seconds in [50.0, *[30.0] * 20, *[1.0] * 20]:
        remaining.step(seconds)
    assert remaining.seconds(990) == 10.0
    assert remaining.seconds(1000) is None
    assert Remaining(10).seconds(1) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.9, "59 s"), (125, "2 min 5 s"), (7200, "2 h"), (93784, "1 d 2 h"), (86405, "1 d 5 s")]
)
def test_a_time_as_a_person_reads_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
