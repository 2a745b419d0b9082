"""`rec-dist submit --to slurm` against a real SLURM with two nodes on this machine. About a minute a job.

Both nodes share this host and its address, so ports and folders must not clash, as for two jobs on one node.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.numpy import load_file
from slurm_cluster import PROGRAMS, Slurm, wait_for

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(os.geteuid() != 0 or None in map(shutil.which, PROGRAMS), reason="needs root and SLURM: make test-launch"),
]

_STEPS = (
    "train.max_steps=600",
    "train.epochs=2000",
    "checkpoint.every_steps=300",
    "train.groups_per_step=4",
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


class Run:
    """A configuration, its run directory, and its jobs."""

    def __init__(self, folder: Path, slurm: Slurm, make: Callable[..., dict[str, Any]]) -> None:
        self._slurm, self.folder = slurm, folder
        self.file, self.path = folder / "run.yaml", folder / "run"
        cluster = ("cluster.launcher=ray", "cluster.num_workers=2")
        submit = {"slurm": {"nodes": 2, "cpus_per_node": 1, "time": "20"}}
        self.file.write_text(yaml.safe_dump({**make(self.path, *cluster), "submit": submit}), encoding="utf-8")

    def submit(self, *overrides: str) -> tuple[int, str, str]:
        """(exit code, job number, standard error)."""
        command = [sys.executable, "-m", "rec_dist", "submit", str(self.file), "--to", "slurm", *overrides]
        environment = {**self._slurm.environment, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        number = done.stderr.partition("submitted batch job ")[2].partition(";")[0]
        return done.returncode, number, done.stderr

    def rows(self, event: str, path: Path | None = None) -> list[dict[str, Any]]:
        file = (path or self.path) / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        return [row for row in rows if row["event"] == event]

    def output(self) -> str:
        return "".join(file.read_text(encoding="utf-8") for file in self.path.with_name("run-slurm").glob("*.out"))

    def nothing_is_left(self, number: str) -> bool:
        """No process and no folder of the job."""
        marks = [f"/tmp/rd{number}.", f"run-slurm/{number}/"]
        left = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
        return not any(mark in " ".join(line) for line in left for mark in marks) and not list(Path("/tmp").glob(f"rd{number}.*"))


@pytest.fixture
def run(tmp_path: Path, slurm: Slurm, tiny_config: Callable[..., dict[str, Any]]) -> Run:
    return Run(tmp_path, slurm, tiny_config)


def test_a_run_over_two_nodes_to_its_end(run: Run, slurm: Slurm) -> None:
    dead = Path("/tmp/rd999999.0")  # of a job that was killed before it could clean up
    dead.mkdir()
    (dead / "lock").touch()
    code, number, err = run.submit()
    assert code == 0, err
    job = slurm.wait_for_end(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.output()
    assert [row["step"] for row in run.rows("step")] == [1, 2, 3, 4]
    assert "starting 2 workers with 1 CPU each" in run.output(), "one worker a node: a node has one CPU"
    logs = run.folder / "run-slurm" / number / "attempt-0"
    assert (logs / "ray-0" / "raylet.out").is_file()
    assert (logs / "ray-1" / "raylet.out").is_file()
    wait_for(lambda: run.nothing_is_left(number), "Ray is gone")
    assert not dead.exists()
    code, number, err = run.submit()
    assert (code, number) == (0, "")
    assert "nothing to do" in err


def test_before_its_limit_a_run_saves_and_is_queued_again_and_ends_as_if_nothing_had_been(run: Run, slurm: Slurm) -> None:
    whole = run.path.with_name("whole")
    _, number, _ = run.submit(*_STEPS, f"train.run_dir={whole}")
    assert slurm.wait_for_end(number)["JobState"] == "COMPLETED", run.output()

    _, number, _ = run.submit(*_STEPS)
    wait_for(lambda: len(run.rows("step")) > 5, "a few steps")
    slurm.ask("scancel", "--batch", "--signal=USR1", number)  # what SLURM sends by --signal=B:USR1@SECONDS before the limit
    wait_for(lambda: slurm.job(number).get("Restarts") == "1", "the job is queued again")
    job = slurm.wait_for_end(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.output()
    stopped_at = run.rows("resume")[0]["step"]
    assert 5 < stopped_at < 600
    assert stopped_at % 300, "saved on request, not by the way"
    assert [row["step"] for row in run.rows("step")] == list(range(1, 601))
    ours, theirs = (load_file(next((path / "model").glob("*.safetensors"))) for path in (run.path, whole))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == [], "bit for bit"


def test_scancel_ends_everything_and_the_run_goes_on_when_submitted_again(run: Run, slurm: Slurm) -> None:
    steps = [step.replace("=300", "=5").replace("=600", "=200") for step in _STEPS]
    _, number, _ = run.submit(*steps)
    wait_for(lambda: run.rows("checkpoint"), "a checkpoint")
    slurm.ask("scancel", number)
    assert slurm.wait_for_end(number)["JobState"] == "CANCELLED"
    wait_for(lambda: run.nothing_is_left(number), "Ray is gone")
    _, number, err = run.submit(*steps)
    assert slurm.wait_for_end(number)["JobState"] == "COMPLETED", (err, run.output())
    assert run.rows("resume")
    assert [row["step"] for row in run.rows("step")] == list(range(1, 201))


def test_stopped_for_good_it_ends_with_75_and_is_not_queued_again(run: Run, slurm: Slurm) -> None:
    _, number, _ = run.submit(*_STEPS)
    wait_for(lambda: run.rows("step"), "a step")
    slurm.ask("scancel", "--batch", "--signal=TERM", number)
    job = slurm.wait_for_end(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), run.output()
    assert run.rows("checkpoint")


def test_a_bad_configuration_never_reaches_the_queue(run: Run, slurm: Slurm) -> None:
    before = slurm.ask("squeue", "--noheader", "--states=all")
    code, number, err = run.submit("train.tokens_per_pack=30")
    assert (code, number) == (2, "")
    assert err.startswith("error: train.tokens_per_pack (30)")
    assert slurm.ask("squeue", "--noheader", "--states=all") == before
    assert not run.path.exists()
    code, _, err = run.submit("submit.slurm.partition=nowhere")
    assert code == 2
    assert err.startswith("error: sbatch refused the job")


def test_an_interface_that_is_not_there_fails_at_once_and_is_named(run: Run, slurm: Slurm) -> None:
    _, number, _ = run.submit("submit.slurm.interface=ib9")
    job = slurm.wait_for_end(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0")
    assert "submit.slurm.interface (ib9)" in run.output()


def test_a_sweep_is_an_array_of_runs(run: Run, slurm: Slurm) -> None:
    """Two elements, one node each, at the same time on the same host."""
    _, number, err = run.submit(
        "submit.slurm.nodes=1", "cluster.num_workers=1", "submit.slurm.sweep=[[train.seed=1],[train.seed=2]]"
    )
    for index in range(2):
        job = slurm.wait_for_end(f"{number}_{index}")
        assert job["JobState"] == "COMPLETED", (err, run.output())
        assert yaml.safe_load((run.folder / f"run-{index}" / "config.yaml").read_text())["train"]["seed"] == index + 1
        assert (run.folder / f"run-{index}" / "finished.json").is_file()


def test_a_node_that_is_lost_does_not_leave_the_job_hanging(run: Run, slurm: Slurm) -> None:
    """Ray dies on both nodes: the job ends with 1 and what it had saved."""
    _, number, _ = run.submit(*_STEPS, "cluster.max_restarts=0")
    wait_for(lambda: run.rows("step"), "a step")
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and any(f"/tmp/rd{number}." in word for word in process.info["cmdline"]):
            process.send_signal(signal.SIGKILL)
    job = slurm.wait_for_end(number)
    assert job["JobState"] == "FAILED", run.output()
    wait_for(lambda: run.nothing_is_left(number), "Ray is gone")
