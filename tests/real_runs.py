"""Real runs for tests of faults: the command line with Ray and DeepSpeed on two workers, and the runs they are compared with."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

PLUGIN = Path(__file__).parent / "distributed" / "fault_plugin"
CHANGES = (
    "task.kind=sdpo",
    "cluster.zero_stage=3",
    "train.global_batch_size=4",
    "train.max_steps=12",
    "checkpoint.every_steps=3",
    "cluster.launcher=ray",
    "cluster.num_workers=2",
    "cluster.cpus_per_worker=0.5",
)
TIMEOUT_SECONDS = 600.0  # many times what a case takes; a hang fails instead of lasting for ever


def command(*words: object, **environment: str) -> subprocess.Popen[str]:
    """Starts `rec-dist WORDS`, outside any cluster that this machine may hold unless it is given one."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    line = [sys.executable, "-m", "rec_dist", *map(str, words)]
    kept["RAY_memory_monitor_refresh_ms"] = "0"  # otherwise Ray kills workers when another user of the machine fills its memory
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**kept, **environment})


def plugged(fault: dict[str, Any]) -> dict[str, str]:
    """The environment that injects `fault` into the workers; see fault_plugin/sitecustomize.py."""
    path = os.pathsep.join([str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "REC_DIST_TEST_FAULT": json.dumps(fault)}


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, standard error)."""
    try:
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
    return process.returncode, err


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits until the condition holds; fails if the process ends first."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, process.kill()
        time.sleep(0.01)


def came_to(run_dir: Path, step: int) -> Callable[[], bool]:
    """Whether metrics.jsonl has the row of `step`."""
    metrics = run_dir / "metrics.jsonl"
    return lambda: metrics.is_file() and f'"step": {step},' in metrics.read_text(encoding="utf-8")


def descendants(process: subprocess.Popen[Any], name: str) -> list[Any]:
    """Processes below `process` whose command line contains `name`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def undisturbed(trainer: Any, *changes: str, workers: int = 2) -> Any:
    """The run without faults, and without Ray."""
    kept = [change for change in (*CHANGES, *changes) if not change.startswith("cluster.") or "zero_stage" in change]
    return trainer.once(*kept, workers=workers)


def assert_same(run: Any, expected: Any) -> None:
    """Compares bit for bit: every weight, every number of every step."""
    assert run.steps == expected.steps
    assert run.weights.keys() == expected.weights.keys()
    assert all(torch.equal(run.weights[name], value) for name, value in expected.weights.items())


def assert_near(run: Any, expected: Any) -> None:
    """Compares losses and every weight within 1e-5, relative: another number of workers sums in another order.

    The norm of a gradient carries the rounding of all steps before it: 1.6e-5 after 60.
    """
    assert [row["step"] for row in run.steps] == [row["step"] for row in expected.steps]
    for row, wanted in zip(run.steps, expected.steps, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    assert run.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert float((run.weights[name] - value).norm()) <= 1e-5 * float(value.norm()), name
