"""The run directory refuses what would mix two runs, and survives a kill at any byte of its metrics."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rec_dist.errors import UserError
from rec_dist.runtime.rows import num_bad_steps
from rec_dist.runtime.run_directory import RunDirectory

CONFIG: dict[str, Any] = {
    "train": {"seed": 0, "max_tokens_per_micro_batch": 512, "log_every_steps": 1},
    "model": {"path": "a", "activation_checkpointing": False},
    "cluster": {"num_workers": 2},
    "checkpoint": {"every_steps": 5},
}


def changed(section: str, key: str, value: Any) -> dict[str, Any]:
    return {**CONFIG, section: {**CONFIG[section], key: value}}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.claim(CONFIG, "train: {seed: 0}\n")
    return run


def test_the_same_configuration_claims_again_and_keeps_what_is_there(run: RunDirectory) -> None:
    run.append({"event": "step", "step": 1})
    run.claim(CONFIG, "other text")
    assert run.config_path.read_text() == "train: {seed: 0}\n"
    assert len(run.rows()) == 1


@pytest.mark.parametrize(("section", "key", "value"), [("train", "seed", 1), ("model", "path", "b"), ("train", "new", None)])
def test_a_changed_result_is_refused_by_name(run: RunDirectory, section: str, key: str, value: Any) -> None:
    if value is None:  # a key that the older run did not know is no difference if its value has no effect
        run.claim(changed(section, key, value), "")
        value = 3
    with pytest.raises(UserError, match=rf"train\.run_dir .*different: {section}\.{key}\)"):
        run.claim(changed(section, key, value), "")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("cluster", "num_workers", 8),
        ("checkpoint", "every_steps", 1),
        ("train", "max_tokens_per_micro_batch", 64),
        ("train", "log_every_steps", 9),
        ("model", "activation_checkpointing", True),
    ],
)
def test_what_changes_no_result_is_free(run: RunDirectory, section: str, key: str, value: Any) -> None:
    run.claim(changed(section, key, value), "")


def test_a_directory_that_was_moved_says_where_it_is_now(run: RunDirectory) -> None:
    moved = changed("train", "run_dir", "/elsewhere/run")
    run.claim(moved, "train: {run_dir: /elsewhere/run}\n")
    assert json.loads((run.path / "config.json").read_text()) == moved
    assert run.config_path.read_text() == "train: {run_dir: /elsewhere/run}\n"


def test_a_key_that_only_begins_like_a_free_one_is_not_free(run: RunDirectory) -> None:
    with pytest.raises(UserError, match="tokens_per_packet"):
        run.claim(changed("train", "tokens_per_packet", 1), "")


def test_tuples_are_the_lists_that_json_makes_of_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.claim({"betas": (0.9, 0.99)}, "")
    run.claim({"betas": (0.9, 0.99)}, "")


def test_a_folder_with_other_files_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and holds no run"):
        RunDirectory(tmp_path).claim(CONFIG, "")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_run_on_a_directory_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        run.claim(CONFIG, "")  # the lock itself does not count as a file of others
        code = "import sys; from pathlib import Path; from rec_dist.runtime.run_directory import RunDirectory as R\n"
        code += "with R(Path(sys.argv[1])).locked(): pass"
        done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=False)
        assert "in use by another process" in done.stderr
        with pytest.raises(UserError, match="in use"), RunDirectory(run.path).locked():
            pass
    with run.locked():
        pass


def test_status_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    """It takes the lock, shared, for a moment, to see whether a process holds it."""
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        pass
    handle = os.open(run.path / ".lock", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, [handle]).start()
    with run.locked():
        pass


def test_an_error_inside_the_lock_releases_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(RuntimeError), run.locked():
        raise RuntimeError
    with run.locked():
        pass


@pytest.mark.parametrize("torn", ['{"event": "st', '{"event": "step", "step": 3', "\x00\x00\x00"])
def test_a_torn_line_costs_that_line_alone(run: RunDirectory, torn: str) -> None:
    for step in (1, 2):
        run.append({"event": "step", "step": step})
    with run.metrics_path.open("a") as handle:
        handle.write(torn)
    assert [row["step"] for row in run.rows()] == [1, 2]
    run.drop_steps_after(2)  # what a restart does first
    run.append({"event": "step", "step": 3})
    assert [row["step"] for row in run.rows()] == [1, 2, 3]


def test_numbers_that_json_does_not_know_are_refused(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="JSON"):
        run.append({"event": "step", "step": 1, "loss": float("nan")})
    assert run.rows() == []


def test_steps_that_a_restart_does_again_are_dropped_and_the_rest_stays(run: RunDirectory) -> None:
    for step in range(1, 6):
        run.append({"event": "step", "step": step})
    run.append({"event": "evaluation", "step": 5})
    run.drop_steps_after(3)
    assert [(row["event"], row["step"]) for row in run.rows()] == [("step", 1), ("step", 2), ("step", 3), ("evaluation", 5)]
    RunDirectory(run.path / "none").drop_steps_after(0)


@pytest.mark.parametrize(("text", "step", "wanted"), [("", 0, True), ("5", 4, False), ("5\n", 5, True), ("now", 0, True)])
def test_a_stop_file_stops_at_once_or_at_its_step(run: RunDirectory, text: str, step: int, wanted: bool) -> None:
    (run.path / "stop").write_text(text)
    assert run.stop_wanted(step) is wanted


def test_a_request_holds_until_it_is_cleared(run: RunDirectory) -> None:
    assert not run.stop_wanted(0)
    run.request_stop()
    assert run.stop_wanted(0)
    run.clear_stop()
    run.clear_stop()
    assert not run.stop_wanted(10**9)


def test_the_driver_follows_the_log_line_by_line(run: RunDirectory) -> None:
    assert run.log_after(0) == ([], 0)
    run.log("first")
    lines, position = run.log_after(0)
    assert [line.split(" ", 2)[2] for line in lines] == ["first"]
    assert position == run.log_size()
    with (run.path / "log.txt").open("ab") as handle:
        handle.write(b"half a li")
    assert run.log_after(position) == ([], position)
    with (run.path / "log.txt").open("ab") as handle:
        handle.write(b"ne\n")
    assert run.log_after(position) == (["half a line"], run.log_size())


def test_progress_result_and_summary(run: RunDirectory) -> None:
    assert run.read_progress() is None
    assert run.finished() is None
    run.progress("train", 3, 10, "loss 0.5")
    assert run.read_progress() == {"phase": "train", "done": 3, "total": 10, "note": "loss 0.5", "seconds_left": None}
    run.clear_progress()
    assert run.read_progress() is None
    run.write_result({"steps": 10})
    assert run.take_result() == {"steps": 10}
    with pytest.raises(OSError, match="result"):
        run.take_result()
    run.finish({"step": 10})
    assert run.finished() == {"step": 10}
    assert json.loads((run.path / "finished.json").read_text()) == {"step": 10}
    assert not any(name.endswith(".tmp") for name in os.listdir(run.path))


def test_bad_steps_in_a_row_are_counted_back_from_where_a_restart_goes_on(run: RunDirectory) -> None:
    for step, event in enumerate(("bad_step", "step", "bad_step", "bad_step", "step"), start=1):
        run.append({"event": event, "step": step})
    assert [num_bad_steps(run.rows(), until=step) for step in range(6)] == [0, 1, 0, 1, 2, 0]
    run.drop_steps_after(3)
    assert [row["step"] for row in run.rows()] == [1, 2, 3]


def test_a_flipped_byte_in_the_metrics_costs_its_line_alone(run: RunDirectory) -> None:
    for step in (1, 2, 3):
        run.append({"event": "step", "step": step})
    data = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(data.replace(b'"step": 2', b'"step"\xba 2') + b"5\n")
    assert [row["step"] for row in run.rows()] == [1, 3]
    assert run.drop_steps_after(1) == 2
    assert [row["step"] for row in run.rows()] == [1]


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    words = r"cannot be a run directory: File name too long; choose another folder$"
    with pytest.raises(UserError, match=words), RunDirectory(tmp_path / ("x" * 300)).claimed(CONFIG, ""):
        pass


@pytest.mark.parametrize(
    ("name", "is_folder"), [("metrics.jsonl", True), ("log.txt", True), ("checkpoints", False), ("model", False)]
)
def test_a_folder_in_place_of_a_file_is_named(run: RunDirectory, name: str, is_folder: bool) -> None:
    (run.path / name).mkdir() if is_folder else (run.path / name).touch()
    what = "file" if is_folder else "folder"
    with pytest.raises(UserError, match=rf"{name} is no {what}; remove it, or choose another train\.run_dir"):
        run.claim(CONFIG, "")
