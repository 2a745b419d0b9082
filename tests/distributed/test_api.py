"""The Python API with real training: twice in one process, with either launcher, from any thread. Nothing stays behind.

Each test runs a script in a process of its own, as a user would; the last line of output holds what it found. Cost: about 15
s for a local training, 40 s with Ray.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from worker_processes import run_command

import rec_dist

pytestmark = pytest.mark.slow
Make = Callable[..., dict[str, Any]]
_ROOT = Path(__file__).parents[2]

# The state of a process as seen from outside. It must be the same before and after a call.
_STATE = """
import json, logging, os, signal, sys, threading, warnings
from pathlib import Path
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed, torch, transformers  # what libraries change when they are imported is theirs
del os.environ["DS_ACCELERATOR"]

def state():
    import torch.distributed
    tiny = torch.full((1,), 1e-40)
    loggers = ("DeepSpeed", "transformers", "ray.data", "rec_dist")
    return {
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "warnings": [str(entry) for entry in warnings.filters],
        "group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "flushed": float(tiny * 0.5) == 0.0,
        "random": torch.get_rng_state().sum().item(),
        "threads": [one.name for one in threading.enumerate() if one.name.startswith(("rec-dist", "watch", "super"))],
        "grad": torch.is_grad_enabled(),
        "tracing": sys.gettrace() is None,
    }

def differing(before, after):
    found = [key for key in before if before[key] != after[key]]
    detail = {key: [before[key], after[key]] for key in found if key != "environment"}
    names = before["environment"].keys() | after["environment"].keys()
    changed = {n: [before["environment"].get(n), after["environment"].get(n)] for n in names
               if before["environment"].get(n) != after["environment"].get(n)}
    return {**detail, **({"environment": changed} if changed else {})}
"""


def run_script(folder: Path, text: str, timeout: int = 300) -> tuple[Any, subprocess.CompletedProcess[str]]:
    """Runs a script that begins with _STATE. Returns the value of its last line, and the process."""
    path = folder / "script.py"
    path.write_text(_STATE + text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(rec_dist.__file__).parents[1]), str(_ROOT / "kernels")])}
    for name in ("TOKENIZERS_PARALLELISM", "OMP_WAIT_POLICY", "DS_ACCELERATOR", "MALLOC_TOP_PAD_", "TRANSFORMERS_VERBOSITY"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(path)], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.fixture
def write(tiny_config: Make, tmp_path: Path) -> Callable[..., Path]:
    """write("name", "section.key=value", ...) writes the file of a configuration whose run directory is `name`."""

    def make(name: str, *changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_config(tmp_path / name, *changes)), encoding="utf-8")
        return path

    return make


@pytest.mark.quick
def test_twice_in_one_process_from_a_thread_and_nothing_stays(write: Callable[..., Path], tmp_path: Path) -> None:
    """Makes two trainings and two evaluations, each equal to the command's, bit for bit. The process is then as it was before."""
    one, two = write("one", "task.kind=sdpo"), write("two", "task.kind=sdpo")
    found, done = run_script(
        tmp_path,
        f"""
import rec_dist
rec_dist.train, rec_dist.evaluate  # imports change what they like
before = state()
out = {{}}
def work():
    for name in ({str(one)!r}, {str(two)!r}):
        run = rec_dist.train(name)
        out[run.path.name] = [row["loss"] for row in run.metrics("step")]
        out[run.path.name + "-hr"] = rec_dist.evaluate(run)
        assert run.finished and run.model_path.is_dir() and run.config.task.kind == "sdpo"
        assert len(run.metrics()) > len(run.metrics("step")) == 4
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps([out, differing(before, state())]))
""",
    )
    out, changed = found
    assert changed == {}
    assert len(done.stdout.splitlines()) == 1, "nothing is printed"
    assert "train 4/4" not in done.stderr, "progress is shown on request only"
    assert out["one"] == out["two"]
    assert out["one-hr"] == out["two-hr"]
    three = write("three", "task.kind=sdpo")
    code, child = run_command(tmp_path, "train", three)
    assert code == 0, child.err
    code, child = run_command(tmp_path, "evaluate", tmp_path / "three")
    assert code == 0, child.err
    assert out["one"] == [row["loss"] for row in rec_dist.Run.open(tmp_path / "three").metrics("step")]
    saved = json.loads((tmp_path / "three" / "evaluation.json").read_text(encoding="utf-8"))
    assert out["one-hr"] == saved["row"]["metrics"]


def test_in_the_main_thread_under_a_running_loop_and_with_ray(write: Callable[..., Path], tmp_path: Path) -> None:
    """A notebook's kernel runs an event loop. The call starts and ends Ray, and Ray's own handler of SIGTERM goes with it."""
    local, ray = write("local", "task.kind=sft"), write("ray", "task.kind=sft", "cluster.launcher=ray")
    found, _ = run_script(
        tmp_path,
        f"""
import asyncio
import rec_dist
rec_dist.train
import ray, ray.train, ray.train.torch
before = state()
async def cell(name):
    return rec_dist.train(name, progress=name.endswith("local.yaml"))
steps = [len(asyncio.run(cell(name)).metrics("step")) for name in ({str(local)!r}, {str(ray)!r})]
metrics = rec_dist.evaluate({str(tmp_path / "ray")!r}, ["evaluate.max_users=5", "cluster.launcher=local"])
import ray as again
print(json.dumps([steps, metrics["hr@1"]["n"], again.is_initialized(), differing(before, state())]))
""",
        timeout=550,
    )
    assert found == [[4, 4], 5, False, {}]


def test_faults_are_exceptions_and_nothing_stays_either(write: Callable[..., Path], tmp_path: Path) -> None:
    """An error, and a stop by SIGINT, which a notebook's interrupt button sends. The same call then continues to the end."""
    config = write("stops", "train.max_steps=40")
    found, done = run_script(
        tmp_path,
        f"""
import logging, time
import rec_dist
rec_dist.train
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
out = []
before = state()
def attempt(*words):
    try:
        rec_dist.train(*words)
        out.append("no fault")
    except BaseException as fault:
        out.append([type(fault).__name__, str(fault)])
def interrupt():
    while not (Path("stops") / "log.txt").is_file() or '"step": 1' not in (Path("stops") / "metrics.jsonl").read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
attempt({str(config)!r}, ["cluster.num_workers=2"])
threading.Thread(target=interrupt, daemon=True).start()
attempt({str(config)!r})
out.append(differing(before, state()))
out.append([row["step"] for row in rec_dist.train({str(config)!r}).metrics("step")])
print(json.dumps(out))
""",
    )
    refused, stopped, changed, steps = found
    assert refused[0] == "UserError" and "cluster.num_workers (2)" in refused[1]
    assert stopped[0] == "StopRequested" and "checkpoint saved" in stopped[1]
    assert changed == {}
    assert steps == list(range(1, 41))
    assert "rec_dist.commands.progress INFO sft:" in done.stderr, "lines of the run's log go to logging"
    assert "rec_dist.commands.progress INFO SIGINT: saving a checkpoint" in done.stderr
    assert "rec_dist.commands.train INFO finished after 40 steps" in done.stderr


def test_a_hang_is_an_exception_and_the_process_goes_on(tmp_path: Path) -> None:
    """The stuck thread is left behind. It must not write any more: its next heartbeat finds another attempt."""
    found, _ = run_script(
        tmp_path,
        """
import time
from rec_dist.config.schema import CheckpointConfig, ClusterConfig
from rec_dist.errors import WorkerFailedError
from rec_dist.launch.workers import launch
from rec_dist.runtime.heartbeat import Heartbeat, SupersededError
from rec_dist.runtime.run_directory import RunDirectory

run, ended, awake = RunDirectory(Path("run")), [], threading.Event()
run.path.mkdir()

def stuck(world, job):
    heart = Heartbeat(run.attempt, 0, "")
    heart.beat("start")
    awake.wait()
    try:
        heart.beat("train", 1)
    except SupersededError:
        ended.append("superseded")
    return {"finished": True, "step": 1}

def well(world, job):
    return {"finished": True, "step": torch.ones(2).sum().item()}

cluster, saving = ClusterConfig(launcher="local", use_gpu=False, hang_seconds=2), CheckpointConfig()
try:
    launch(stuck, None, cluster, run, saving=saving, owns_process=False)
except WorkerFailedError as fault:
    said = str(fault)
awake.set()
for thread in threading.enumerate():
    if thread.name == "rec-dist-worker":
        thread.join()
after = launch(well, None, cluster, run, saving=saving, owns_process=False)
print(json.dumps([said, ended, after["step"], "stuck" in (run.stacks / "rank-0.txt").read_text()]))
""",
    )
    said, ended, step, stacks = found
    assert "cluster.hang_seconds 2" in said
    assert ended == ["superseded"]
    assert step == 2.0
    assert stacks
