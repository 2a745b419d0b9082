"""When a failed attempt is followed by another, and what is reported when it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rec_dist.errors import StopRequested, WorkerFailedError
from rec_dist.launch.restart import FINAL, HeadLostError, NotPlacedError, Paused, cause_of, with_restarts
from rec_dist.runtime.run_directory import RunDirectory

TRACEBACK = "Traceback (most recent call last):\n  ...\nOSError: disk"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


def attempts(run: RunDirectory, ends: list[Any]) -> Callable[[], dict[str, Any]]:
    """Makes one attempt an end: a number is a failure after that step, an exception is raised, a dict is returned."""

    def attempt() -> dict[str, Any]:
        end = ends.pop(0)
        if isinstance(end, dict):
            return end
        if isinstance(end, Exception):
            raise end
        if end:
            run.progress("train", end, 100)
        raise RuntimeError(TRACEBACK)

    return attempt


def test_failures_at_other_steps_are_restarted_and_written_down(run: RunDirectory) -> None:
    assert with_restarts(attempts(run, [0, 7, 9, {"step": 12}]), run, limit=3) == {"step": 12}
    rows = [(row["event"], row["step"], row["restart"], row["reason"]) for row in run.rows()]
    assert rows == [("restart", step, number, "OSError: disk") for number, step in ((1, 0), (2, 7), (3, 9))]


@pytest.mark.parametrize(("ends", "left"), [([5, 5, {}], 1), ([0, 0, {}], 1), ([5, 8, 5, {}], 1)])
def test_twice_at_one_step_is_the_end(run: RunDirectory, ends: list[Any], left: int) -> None:
    with pytest.raises(WorkerFailedError, match="as in an earlier attempt") as caught:
        with_restarts(attempts(run, ends), run, limit=9)
    assert str(caught.value).count("Traceback") == 1
    assert len(ends) == left


@pytest.mark.parametrize("limit", [0, 2])
def test_the_limit_is_kept(run: RunDirectory, limit: int) -> None:
    ends: list[Any] = [1, 2, 3, 4]
    with pytest.raises(WorkerFailedError, match="OSError: disk"):
        with_restarts(attempts(run, ends), run, limit=limit)
    assert len(ends) == 3 - limit
    assert len(run.rows()) == limit


@pytest.mark.parametrize("kind", [*FINAL, StopRequested, HeadLostError])
def test_what_a_restart_cannot_help_is_raised_as_it_is(run: RunDirectory, kind: type[Exception]) -> None:
    ends: list[Any] = [kind("lower it"), {}]
    with pytest.raises(kind, match="lower it"):
        with_restarts(attempts(run, ends), run, limit=3)
    assert len(ends) == 1


def test_the_cause_is_not_what_its_peers_say_of_it() -> None:
    fault = RuntimeError("two workers failed")
    echo = "Traceback\nRuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
    fault.worker_failures = {0: RuntimeError(echo), 1: OSError(TRACEBACK)}  # type: ignore[attr-defined]
    assert cause_of(fault) == TRACEBACK
    fault.worker_failures = {0: RuntimeError(echo)}  # type: ignore[attr-defined]
    assert cause_of(fault) == echo
    assert cause_of(RuntimeError()) == "RuntimeError()"


def test_a_pause_is_no_failure(run: RunDirectory) -> None:
    assert with_restarts(attempts(run, [Paused(4), Paused(6), 5, {"step": 9}]), run, limit=1) == {"step": 9}
    assert [(row["event"], row["step"]) for row in run.rows()] == [("resize", 4), ("resize", 6), ("restart", 5)]


def test_no_room_is_no_fault_of_a_step_but_counts(run: RunDirectory) -> None:
    assert with_restarts(attempts(run, [NotPlacedError("full"), NotPlacedError("full"), {}]), run, limit=2) == {}
    with pytest.raises(WorkerFailedError, match=r"after 1 restart\(s\)"):
        with_restarts(attempts(run, [NotPlacedError("full"), NotPlacedError("full"), {}]), run, limit=1)


def test_a_failure_while_stopping_is_the_stop(run: RunDirectory) -> None:
    """SIGTERM to a whole process group: the workers die of it before they can save."""
    run.request_stop()
    with pytest.raises(StopRequested, match="from the newest checkpoint"):
        with_restarts(attempts(run, [5, {}]), run, limit=3)
    assert "while the run was stopping" in (run.path / "log.txt").read_text(encoding="utf-8")


def test_lost_at_the_start_twice_with_progress_between_is_no_bug(run: RunDirectory) -> None:
    """Days of training meet several lost nodes. Two that are lost while workers start are not the same step."""
    ends: list[Any] = [0, 7, 0, {"step": 12}]
    attempt = attempts(run, ends)

    def saving() -> dict[str, Any]:
        if len(ends) == 3:
            run.append({"event": "checkpoint", "step": 6})
        return attempt()

    assert with_restarts(saving, run, limit=9) == {"step": 12}
    with pytest.raises(WorkerFailedError, match="before the first step, as in an earlier attempt"):
        with_restarts(attempts(run, [0, 0, {}]), run, limit=9)
