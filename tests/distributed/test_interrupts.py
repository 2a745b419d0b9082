"""Ctrl-C, once and twice, in the middle of real commands: one line, the documented exit code, and nothing half-written. A minute."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from real_runs import assert_same, finish, plugged, write_config

pytestmark = pytest.mark.slow

_STUCK = {"kind": "slow", "seconds": 600, "driver": True}  # so that the command is there when the signal comes
# A shell that runs the tests in the background makes its children ignore SIGINT.
_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from rec_dist.cli import main
sys.exit(main(sys.argv[1:]))
"""


def begin(phase: str, marker: Path, *words: object, **fault: Any) -> subprocess.Popen[str]:
    """Starts a command that stops at `phase`, and waits until it is there."""
    environment = {**os.environ, **plugged({**_STUCK, "phase": phase, "marker": str(marker), **fault})}
    line = [sys.executable, "-c", _PROGRAM, *map(str, words)]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not marker.exists():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, process.kill()
        time.sleep(0.05)
    return process


def interrupt(process: subprocess.Popen[str], times: int) -> tuple[int, str, float]:
    """(exit code, standard error, seconds until the end)."""
    began = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    code, err = finish(process)
    return code, err, time.monotonic() - began


@pytest.mark.parametrize("times", [1, 2])
def test_train(trainer: Any, tmp_path: Path, times: int) -> None:
    """Once: the step ends, a checkpoint is saved, 75. Twice: the process ends at once. Both continue to the same parameters."""
    changes = ("train.max_steps=6", "checkpoint.every_steps=2", "train.epochs=4")
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *changes))
    seconds = 8 if times == 1 else 600
    process = begin("in a step", tmp_path / "there", "train", config, call=4, seconds=seconds)
    code, err, took = interrupt(process, times)
    assert "Traceback" not in err
    found = None
    if times == 1:
        assert code == 75 and "SIGINT: saving a checkpoint after this step, then stopping" in err, err
        # The signal comes while the optimizer steps, after the ranks have agreed on this step, so the next one sees it.
        found = re.search(r"stopped after step ([45]), checkpoint saved", err)
        assert found, err
    else:
        assert code == 1 and "interrupted; what was saved before is kept" in err and took < 30, err
    code, err = finish(begin_plain("train", config))
    assert code == 0, err
    run, expected = trainer.read(run_dir), trainer.once(*changes)
    assert [row["step"] for row in run.rows if row["event"] == "resume"] == [int(found[1]) if found else 2]
    assert_same(run, expected)


def begin_plain(*words: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", _PROGRAM, *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("command", ["evaluate", "rank"])
def test_evaluate_and_rank(trainer: Any, tmp_path: Path, command: str, times: int) -> None:
    run = trainer.once()
    output = tmp_path / "out.parquet"
    own = ("--top-k", 3, "--out", output) if command == "rank" else (f"evaluate.output_dir={tmp_path / 'results'}",)
    words = (command, run.path, *own)
    code, err, took = interrupt(begin(f"in {command}", tmp_path / "there", *words), times)
    assert code == 1 and took < 30, err
    assert {line for line in err.splitlines() if "interrupted" in line} == {"interrupted; what was saved before is kept"}
    assert "Traceback" not in err
    assert not output.exists() and not (tmp_path / "results" / "evaluation.json").exists()
    code, err = finish(begin_plain(*words))
    assert code == 0, err
    assert output.is_file() or (tmp_path / "results" / "evaluation.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pipeline(trainer: Any, tmp_path: Path, number: signal.Signals) -> None:
    """In a stage that trains: Ctrl-C reaches all processes of the terminal, SIGTERM the command alone. Both save and end with 75.

    The same command goes on to the parameters of an undisturbed run.
    """
    changes = ("train.max_steps=6", "checkpoint.every_steps=2", "train.epochs=4")
    run_dir = tmp_path / "run"
    write_config(tmp_path / "run.yaml", trainer.config(run_dir, *changes))
    stages = [
        {"name": "train", "do": "train", "target": "run.yaml"},
        {"name": "popularity", "do": "evaluate", "target": "run.yaml", "set": ["evaluate.ranker=popularity"]},
    ]
    value = {"pipeline": {"title": "Tiny", "run_dir": str(tmp_path / "report"), "stages": stages}}
    pipeline = write_config(tmp_path / "pipeline.yaml", value)
    process = begin("in a step", tmp_path / "there", "run", pipeline, call=4, seconds=8)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    code, err = finish(process)
    assert code == 75 and f"{number.name}: saving a checkpoint after this step, then stopping" in err, err
    assert "stage train ended with exit code 75" in err and "Traceback" not in err, err
    code, err = finish(begin_plain("run", pipeline))
    assert code == 0, err
    assert_same(trainer.read(run_dir), trainer.once(*changes))
    assert (tmp_path / "report" / "report.html").is_file()
