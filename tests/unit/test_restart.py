"""When a failed attempt is followed by another, and what is said when it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rec_dist.pipeline.restart import FINAL, cause_of, with_restarts
from rec_dist.runtime.errors import WorkerFailedError
from rec_dist.runtime.run_directory import RunDirectory

TRACEBACK = "Traceback (most recent call last):\n  ...\nOSError: disk"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


def attempts(run: RunDirectory, ends: list[Any]) -> Callable[[], dict[str, Any]]:
    """One attempt an end: a number is a failure after that step, an exception is raised, a dict returned."""

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


@pytest.mark.parametrize("kind", FINAL)
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
