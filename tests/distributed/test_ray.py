"""Real Ray Train workers, through the command line as a user calls it. A start takes about 20 s, so tests are few and long."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from real_runs import descendants
from worker_processes import run_command

pytestmark = pytest.mark.slow

_CHANGES = (
    "task.kind=sdpo",
    "cluster.zero_stage=3",
    "train.global_batch_size=4",
    "train.max_steps=12",
    "checkpoint.every_steps=100",
)
_RAY = ("cluster.launcher=ray", "cluster.num_workers=2", "cluster.cpus_per_worker=0.5")
_MINUTES = 240.0


def command(*words: object) -> subprocess.Popen[str]:
    """Starts `rec-dist WORDS` outside any cluster that this machine may hold."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    line = [sys.executable, "-m", "rec_dist", *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, standard error)."""
    try:
        _, err = process.communicate(timeout=_MINUTES)
    finally:
        process.kill()
    return process.returncode, err


def test_stopped_resumed_and_evaluated_on_two_workers(trainer: Any, tmp_path: Path) -> None:
    """SIGTERM to the driver gives 75; the same command then gives 0, with the weights of an undisturbed run.

    The evaluation equals that of one local worker.
    """
    from rec_dist.data.artifacts.predictions import Predictions

    run_dir = tmp_path / "run"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(trainer.config(run_dir, *_CHANGES, *_RAY)), encoding="utf-8")
    process = command("train", path)
    deadline = time.monotonic() + _MINUTES
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 2,' in metrics.read_text(encoding="utf-8")):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, process.kill()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    assert code == 75, err
    assert "Traceback" not in err
    code, err = finish(command("train", path))
    assert code == 0, err
    expected = trainer.once(*_CHANGES, workers=2)
    run = type(expected)(run_dir)
    assert [row["event"] for row in run.rows].count("resume") == 1
    assert run.steps == expected.steps
    assert all(torch.equal(run.weights[name], value) for name, value in expected.weights.items())

    code, err = finish(command("evaluate", run_dir, "evaluate.max_users=4"))
    assert code == 0, err
    on_ray = Predictions.read(run_dir / "predictions.arrow")
    (run_dir / "evaluation.json").unlink()
    local = ("cluster.launcher=local", "cluster.num_workers=1", "cluster.zero_stage=0", "train.max_tokens_per_micro_batch=300")
    code, child = run_command(tmp_path, "evaluate", run_dir, "evaluate.max_users=4", *local)
    assert code == 0, child.err
    here = Predictions.read(run_dir / "predictions.arrow")
    np.testing.assert_allclose(np.concatenate(on_ray.scores), np.concatenate(here.scores), rtol=1e-5, atol=1e-5)
    assert np.array_equal(on_ray.ranks, here.ranks)


def test_a_stop_while_ray_is_starting(trainer: Any, tmp_path: Path) -> None:
    """From ray.init() on, Ray's own handler takes SIGTERM, and would end the command with 15 and without a message."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(trainer.config(tmp_path / "run", *_CHANGES, *_RAY)), encoding="utf-8")
    process = command("train", path)
    deadline = time.monotonic() + _MINUTES
    while not descendants(
        process, "gcs_server"
    ):  # the first process is the head's; the others and the workers come seconds later
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, process.kill()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    assert (code, err) == (75, "stopped while Ray was starting; run the same command to go on\n")


_THREADS = """
import json, sys
from pathlib import Path
import ray
import torch
from rec_dist.config.schema import ClusterConfig
from rec_dist.launch.workers import launch
from rec_dist.runtime.run_directory import RunDirectory

def worker(world, job):
    return {"workers": world.size, "threads": torch.get_num_threads()}

result = launch(worker, None, ClusterConfig(use_gpu=False), RunDirectory(Path(sys.argv[1])))
print(json.dumps({**result, "cores": int(ray.cluster_resources()["CPU"])}))
"""


def test_without_gpus_one_worker_computes_with_all_cores(tmp_path: Path) -> None:
    """Ray sets OMP_NUM_THREADS to a worker's CPUs before torch is imported there, unless you have set it."""
    (tmp_path / "run").mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}
    line = [sys.executable, "-c", _THREADS, str(tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, env=kept, timeout=_MINUTES, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["workers"] == 1 and found["threads"] == found["cores"]


def test_more_workers_than_the_machine_has(trainer: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(trainer.config(run_dir, "cluster.launcher=ray", "cluster.num_workers=999")), encoding="utf-8")
    code, err = finish(command("train", path))
    lines = err.splitlines()
    assert code == 2, err
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    assert "cluster.num_workers (999)" in lines[-1]
    assert "lower one of them or add nodes" in lines[-1]
    assert not run_dir.exists()


def test_a_fault_inside_a_worker_is_one_line(trainer: Any, tmp_path: Path) -> None:
    """A fault that only a worker can see reaches the driver as the user's mistake."""
    run_dir = tmp_path / "run"
    path = tmp_path / "config.yaml"
    changes = (*_RAY, "cluster.num_workers=1", "adapter.target_modules=[nothing]")
    path.write_text(yaml.safe_dump(trainer.config(run_dir, *changes)), encoding="utf-8")
    code, err = finish(command("train", path))
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "adapter.target_modules" in errors[0]
    assert "Traceback" not in err
    assert not run_dir.exists()


@pytest.mark.quick
def test_a_killed_worker_is_replaced_and_nothing_is_lost(trainer: Any, tmp_path: Path) -> None:
    """SIGKILL of one of two workers, once: the same command continues from the newest checkpoint to the same weights."""
    run_dir = tmp_path / "run"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(trainer.config(run_dir, *_CHANGES, *_RAY, "checkpoint.every_steps=3")), encoding="utf-8")
    process = command("train", path)
    deadline = time.monotonic() + _MINUTES
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 4,' in metrics.read_text(encoding="utf-8")):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, process.kill()
        time.sleep(0.01)
    workers = descendants(process, "ray::RayTrainWorker")
    assert len(workers) == 2
    workers[-1].kill()
    code, err = finish(process)
    assert code == 0, err
    assert "Traceback" not in err
    assert "restart 1 of 3" in err
    expected = trainer.once(*_CHANGES, workers=2)
    run = type(expected)(run_dir)
    assert [row["event"] for row in run.rows if row["event"] in ("restart", "resume")] == ["restart", "resume"]
    assert run.steps == expected.steps
    assert all(torch.equal(run.weights[name], value) for name, value in expected.weights.items())


def test_a_bug_is_tried_twice_and_reported_once(trainer: Any, tmp_path: Path) -> None:
    """A file stands where the checkpoint of step 4 goes: every attempt fails there, the second from the checkpoint of step 2."""
    run_dir = tmp_path / "run"
    changes = (*_CHANGES, *_RAY, "checkpoint.every_steps=2")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(trainer.config(run_dir, *changes)), encoding="utf-8")
    trainer.claim(run_dir, changes)
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "step-00000004.tmp").write_text("in the way", encoding="utf-8")
    code, err = finish(command("train", path))
    assert code == 1, err
    assert err.count("Traceback") == 1
    assert "failed: a worker failed after step 4, as in an earlier attempt" in err
    assert "FileExistsError" in err.splitlines()[-1]
    rows = type(trainer.once(*_CHANGES, workers=2))(run_dir).rows
    assert [(row["event"], row["step"]) for row in rows if row["event"] in ("restart", "resume")] == [
        ("restart", 4),
        ("resume", 2),
    ]
