"""`rec-dist status` on run directories as runs leave them; the numbers are worked out by hand."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from rec_dist.cli import main
from rec_dist.commands.status import noting_failure, status, status_of
from rec_dist.errors import NotFiniteError, StopRequested, UserError, WorkerFailedError
from rec_dist.runtime.rows import num_restarts
from rec_dist.runtime.run_directory import RunDirectory

STARTED = 1_700_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Began at STARTED; 6 of 10 steps of 5 s each are done, with one restart in between."""
    run = RunDirectory(tmp_path / "run")
    run.claim({"train": {"seed": 0}}, "train: {seed: 0}\n")
    for step in range(1, 7):
        run.append({"event": "step", "step": step, "step_seconds": 5.0})
        if step == 4:
            run.append({"event": "restart", "step": 4, "restart": 1, "reason": "node lost"})
    run.progress("train", 6, 10, "loss 1.0", 20.0)
    for step in (2, 4):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    (run.checkpoints / "step-00000006.tmp").mkdir()
    for file in run.path.iterdir():
        os.utime(file, (STARTED, STARTED + (0 if file.name == "config.json" else 60)))
    return run


def test_a_run_that_goes_on(run: RunDirectory) -> None:
    with run.locked():
        found = status_of(run.path, now=STARTED + 100)
    assert (found.state, found.phase, found.done, found.total) == ("running", "train", 6, 10)
    assert found.eta == pytest.approx(20)
    assert found.goodput == pytest.approx(6 * 5.0 / 100)
    assert found.seen == pytest.approx(40)
    assert (found.restarts, found.checkpoint, found.error) == (1, 4, "after step 4: node lost")


def test_a_run_that_stands_still_has_no_eta_and_counts_until_its_last_sign_of_life(run: RunDirectory) -> None:
    found = status_of(run.path, now=STARTED + 100_000)
    assert found.state.startswith("not running")
    assert found.eta is None
    assert found.goodput == pytest.approx(6 * 5.0 / 60)


def test_steps_that_were_not_written_down_count_for_the_goodput(tmp_path: Path) -> None:
    """With train.log_every_steps=3 a row stands for three steps."""
    run = RunDirectory(tmp_path / "run")
    run.claim({}, "{}\n")
    for step in (3, 6):
        run.append({"event": "step", "step": step, "step_seconds": 2.0})
    for file in run.path.iterdir():
        os.utime(file, (STARTED, STARTED + (0 if file.name == "config.json" else 24)))
    assert status_of(run.path).goodput == pytest.approx(6 * 2.0 / 24)


def test_the_time_counts_from_the_first_start_whenever_the_files_were_copied(run: RunDirectory) -> None:
    run.append({"event": "start", "time": STARTED})
    run.append({"event": "start", "time": STARTED + 30})
    for file in run.path.iterdir():
        os.utime(file, (STARTED, STARTED + 60))
    assert status_of(run.path).goodput == pytest.approx(6 * 5.0 / 60)


def test_a_copy_does_not_tell_whether_the_run_goes_on(run: RunDirectory) -> None:
    (run.path / "owner.json").write_text("{}")
    assert status_of(run.path).state == "not finished when it was copied"


@pytest.mark.parametrize("fault", [NotFiniteError("too many\nbad steps"), WorkerFailedError("Traceback\nbad steps")])
def test_why_a_run_failed(run: RunDirectory, fault: Exception) -> None:
    with pytest.raises(type(fault)), noting_failure(run):
        raise fault
    found = status_of(run.path)
    assert found.state.startswith("failed")
    assert found.error == "after step 6: bad steps"
    run.append({"event": "resume", "step": 4})
    assert not status_of(run.path).state.startswith("failed"), "another attempt has begun since"


def test_a_finished_run(run: RunDirectory) -> None:
    run.finish({"step": 10, "finished": True})
    run.progress("evaluate", 3, 500)
    found = status_of(run.path)
    assert (found.state, found.phase, found.done, found.total, found.eta) == ("finished", "train", 10, 10, None)
    lines = dict(line.split(maxsplit=1) for line in status(str(run.path)))
    assert lines["step"] == "10 of 10 (100 %)"
    assert lines["state"].startswith("finished; last sign of life")
    assert any("10 of 10 (100 %)" in line for line in status(f"file://{run.path}"))


def test_what_is_written_after_the_end_does_not_lower_the_goodput(run: RunDirectory) -> None:
    """An evaluation a week later, or a copy whose files are new."""
    run.append({"event": "start", "time": STARTED})
    run.finish({"step": 6, "finished": True, "time": STARTED + 40})
    for file in run.path.iterdir():
        os.utime(file, (STARTED, STARTED + 7 * 86_400))
    assert status_of(run.path).goodput == pytest.approx(6 * 5.0 / 40)


def test_a_fitted_run_has_no_steps(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim({}, "{}\n")
    run.finish({"step": 0, "finished": True, "seconds": 0.2})
    lines = dict(line.split(maxsplit=1) for line in status(str(run.path)))
    assert lines["step"] == "none: the model was fitted at once"


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim({}, "{}\n")
    found: Any = status_of(run.path, now=time.time())
    assert (found.done, found.total, found.eta, found.goodput, found.checkpoint, found.error) == (0, 0, None, None, None, None)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        status_of(tmp_path)


@pytest.mark.parametrize(
    ("events", "restarts"),
    [
        ([], 0),
        (["restart"], 1),  # before the first checkpoint: nothing to resume
        (["restart", "resume"], 1),
        (["resume"], 1),  # the same command again, by hand
        (["restart", "resume", "resume"], 2),
        (["restart", "resize", "resume", "restart", "resume", "resume"], 4),
    ],
)
def test_each_new_beginning_counts_once(tmp_path: Path, events: list[str], restarts: int) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim({}, "{}\n")
    for step, event in enumerate(events, start=1):
        run.append({"event": event, "step": step, "reason": "x"})
        run.append({"event": "step", "step": step, "step_seconds": 1.0})
    assert num_restarts(run.rows()) == status_of(run.path).restarts == restarts


def test_steps_that_were_left_out_are_no_goodput(run: RunDirectory) -> None:
    run.append({"event": "bad_step", "step": 7, "users": []})
    with run.locked():
        assert status_of(run.path, now=STARTED + 100).goodput == pytest.approx(6 * 5.0 / 100)
    assert status_of(run.path).error == "step 7: loss or gradient not finite, left out"


def test_a_checkpoint_that_could_not_be_written_is_an_error(run: RunDirectory) -> None:
    run.append({"event": "checkpoint_failed", "step": 6, "reason": "no space left on /shared"})
    assert status_of(run.path).error == "no checkpoint after step 6: no space left on /shared"


def test_any_fault_is_reported_but_a_stop_is_none(run: RunDirectory) -> None:
    with pytest.raises(UserError), noting_failure(run):
        raise UserError("cluster.num_workers (8) is more than the cluster holds")
    assert status_of(run.path).error == "after step 6: cluster.num_workers (8) is more than the cluster holds"
    rows = len(run.rows())
    with pytest.raises(StopRequested), noting_failure(run):
        raise StopRequested("stopped after step 6")
    assert len(run.rows()) == rows
    with pytest.raises(KeyError), noting_failure(run):
        raise KeyError
    assert status_of(run.path).error == "after step 6: KeyError"


@pytest.mark.parametrize(
    "row",
    [
        '{"event": "step"}',
        '{"event": "step", "step": "a", "step_seconds": "x"}',
        '{"event": "step", "step": 7, "step_seconds": "x"}',
        '{"event": "step", "step": 7, "step_seconds": NaN}',
        '{"event": "step", "step": true}',
        '{"event": "bad_step"}',
        '{"event": "failed"}',
        '{"event": "failed", "step": 6}',
        '{"event": "restart", "step": 6, "reason": 5}',
        '{"event": "checkpoint_failed"}',
        '{"event": "start"}',
        '{"event": "start", "time": []}',
        '{"event": ["x"], "step": {}}',
        "[" * 200_000,
    ],
)
def test_a_damaged_row_is_left_out(run: RunDirectory, row: str) -> None:
    whole = status_of(run.path, now=STARTED + 100)
    with run.metrics_path.open("a", encoding="utf-8") as handle:
        handle.write(f"{row}\n")
    os.utime(run.metrics_path, (STARTED, STARTED + 60))
    assert status_of(run.path, now=STARTED + 100) == whole


@pytest.mark.parametrize("row", ['{"event": "step"}', '{"event": "step", "step": "x"}'])
def test_why_a_run_failed_is_reported_beside_a_damaged_row(run: RunDirectory, row: str) -> None:
    with run.metrics_path.open("a", encoding="utf-8") as handle:
        handle.write(f"{row}\n")
    with pytest.raises(NotFiniteError), noting_failure(run):
        raise NotFiniteError("bad steps")
    assert status_of(run.path).error == "after step 6: bad steps"


@pytest.mark.parametrize("text", ["{}", '{"phase": 1}', '{"step": "x"}', "[]", "", "[" * 200_000])
def test_a_damaged_finished_json_is_named_with_the_way_out(
    run: RunDirectory, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "finished.json").write_text(text)
    assert main(["status", str(run.path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {run.path / 'finished.json'} ")
    assert "remove that file and run `rec-dist train` again" in lines[0]


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"phase": 1, "done": 1, "total": 2}', '{"phase": "train", "done": "a", "total": "b"}', "[" * 200_000]
)
def test_a_damaged_progress_is_none(run: RunDirectory, text: str) -> None:
    (run.path / "progress.json").write_text(text)
    found = status_of(run.path)
    assert (found.done, found.total, found.eta) == (0, 0, None)
    assert found.error == "after step 4: node lost"


def test_without_config_json_there_is_no_goodput(run: RunDirectory) -> None:
    (run.path / "config.json").unlink()
    found = status_of(run.path)
    assert (found.goodput, found.done, found.checkpoint) == (None, 6, 4)


@pytest.mark.parametrize("name", ["x" * 5000, "/".join(["x" * 200] * 50)])
def test_a_name_that_no_file_system_takes_is_no_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "xxx" in line and "is no run directory" in line and len(line) < 400
