"""`rec-dist submit --to ray` against a real Ray cluster and its job server. The command exits with the driver's code.

The source is sent along, so that the cluster runs this checkout. The cluster has a token, as every `ray start` gives it. A job
takes about 30 s.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.launch

_TIMEOUT = 600.0  # a job takes 30 s on two free cores, minutes on a busy machine
_LONG = ("train.epochs=2000", "train.max_steps=4000", "checkpoint.every_steps=1000")


def wait_for(what: Callable[[], Any], why: str, child: subprocess.Popen[str] | None = None) -> Any:
    until = time.monotonic() + _TIMEOUT
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        assert child is None or child.poll() is None, f"ended before {why}: {child.communicate()}"
        time.sleep(0.2)
    raise TimeoutError(why)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of a user of a running cluster."""
    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))  # short, for Ray's sockets
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    port = free_port()
    ports = [f"--port={free_port()}", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"]
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", *ports]
    with (folder / "start.txt").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        request = urllib.request.Request(
            f"{address}/api/version", headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            assert head.poll() is None, (folder / "start.txt").read_text(encoding="utf-8")
            return False

    try:
        wait_for(answers, "the job server answers")
        yield {**environment, "RAY_API_SERVER_ADDRESS": address}
        assert head.poll() is None, (folder / "start.txt").read_text(encoding="utf-8")
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


class User:
    """Someone at a terminal, with a configuration."""

    def __init__(self, folder: Path, environment: dict[str, str], make: Callable[..., dict[str, Any]]) -> None:
        self._environment = {**environment, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.file, self.run_dir = folder / "run.yaml", folder / "run"
        cluster = ("cluster.launcher=ray", "cluster.num_workers=2", "cluster.cpus_per_worker=0.5")
        config = {**make(self.run_dir, *cluster, "checkpoint.grace_seconds=60"), "submit": {"ray": {"ship": "source"}}}
        self.file.write_text(yaml.safe_dump(config), encoding="utf-8")

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rec_dist", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self._environment, text=True, stdout=pipe, stderr=pipe, process_group=0)

    def run(self, *words: str) -> tuple[int, str, str]:
        with self.start(*words) as child:
            try:
                out, err = child.communicate(timeout=_TIMEOUT)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
            return child.returncode, out, err

    def submit(self, *overrides: str) -> tuple[int, str, str]:
        return self.run("submit", str(self.file), "--to", "ray", *overrides)

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


@pytest.fixture
def user(tmp_path: Path, cluster: dict[str, str], tiny_config: Callable[..., dict[str, Any]]) -> User:
    return User(tmp_path, cluster, tiny_config)


def test_0_a_run_to_its_end_and_nothing_is_sent_for_it_again(user: User) -> None:
    code, out, err = user.submit()
    assert code == 0, (out, err)
    assert [row["step"] for row in user.rows if row["event"] == "step"] == [1, 2, 3, 4]
    assert "finished after 4 steps" in out, "the driver's output is shown"
    code, _, err = user.submit()
    assert code == 0
    assert "nothing to do" in err
    assert "submitted" not in err


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["no token", "another"])
def test_0_a_stranger_is_refused_in_one_line(user: User, token: str | None) -> None:
    words = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""} if token is None else {"RAY_AUTH_TOKEN": token}
    known, user._environment = user._environment, {**user._environment, **words}
    asked = [("--follow", "rec-dist-run"), ("--stop", "rec-dist-run")]
    for command in (("submit", str(user.file), "--to", "ray"), *(("submit", *words) for words in asked)):
        code, out, err = user.run(*command)
        assert code == 2, (out, err)
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
        assert known["RAY_AUTH_TOKEN"] not in out + err
    assert user.rows == []


def test_0_an_evaluation_is_that_of_the_run_and_waits_for_its_end(user: User) -> None:
    words = ("submit.command=evaluate", "evaluate.num_candidates=5", "evaluate.max_users=4")
    code, _, err = user.submit(*words)
    assert code == 2
    assert "is no run directory" in err
    assert user.submit()[0] == 0
    code, out, err = user.submit(*words)
    assert code == 0, (out, err)
    assert [row["num_candidates"] for row in user.rows if row["event"] == "evaluation"] == [5]
    assert not user.run_dir.with_name("run-base").exists()


def test_1_a_run_that_fails(user: User) -> None:
    code, out, err = user.submit("optimizer.lr=1e30", "train.max_bad_steps=0", "train.global_batch_size=4")
    assert code == 1, (out, err)
    assert "failed: " in out
    code, out, _ = user.run("status", str(user.run_dir))
    assert code == 0
    assert "failed; the last checkpoint is kept" in out


def test_2_a_mistake_that_only_the_cluster_can_see(user: User) -> None:
    code, out, err = user.submit("cluster.num_workers=50")
    assert code == 2, (out, err)
    assert "error: cluster.num_workers (50)" in out


def test_2_a_mistake_that_is_seen_before_anything_is_sent(user: User) -> None:
    code, _, err = user.submit("train.max_tokens_per_micro_batch=30")
    assert code == 2
    assert err.startswith("error: train.max_tokens_per_micro_batch (30)")
    assert not user.run_dir.exists()


def test_2_no_cluster_answers(user: User) -> None:
    user._environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{free_port()}"
    code, _, err = user.submit()
    assert code == 2
    assert f"error: no job server answers at {user._environment['RAY_API_SERVER_ADDRESS']}: " in err
    assert "Traceback" not in err


def test_75_a_run_that_is_asked_to_stop_by_its_file(user: User) -> None:
    child = user.start("submit", str(user.file), "--to", "ray", *_LONG)
    wait_for(lambda: any(row["event"] == "step" for row in user.rows), "a first step", child)
    (user.run_dir / "stop").write_text("", encoding="utf-8")
    out, err = child.communicate(timeout=_TIMEOUT)
    assert child.returncode == 75, (out, err)


def test_stopped_with_a_checkpoint_is_75_and_submitted_again_it_goes_on(user: User) -> None:
    """Detached with Ctrl-C, stopped from elsewhere, followed to the end, submitted again."""
    child = user.start("submit", str(user.file), "--to", "ray", *_LONG)
    wait_for(lambda: any(row["event"] == "step" for row in user.rows), "a first step", child)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=_TIMEOUT)
    assert child.returncode == 130
    job = re.search(r"rec-dist submit --follow (\S+)", err)
    assert job is not None, err
    seen = len(user.rows)
    wait_for(lambda: len(user.rows) > seen, "the job goes on by itself")

    code, out, err = user.run("submit", "--stop", job[1])
    assert code == 75, (out, err)
    assert "STOPPED" in err
    code, _, _ = user.run("submit", "--follow", job[1])
    assert code == 75, "the same answer later"
    stopped_at = max(row["step"] for row in user.rows if row["event"] == "checkpoint")

    child = user.start("submit", str(user.file), "--to", "ray", *_LONG)
    wait_for(lambda: any(row["event"] == "step" and row["step"] > stopped_at for row in user.rows), "a further step", child)
    assert [row["step"] for row in user.rows if row["event"] == "resume"] == [stopped_at]
    steps = [row["step"] for row in user.rows if row["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1)), "no step is missing and none is there twice"
    (user.run_dir / "stop").write_text("", encoding="utf-8")
    child.communicate(timeout=_TIMEOUT)
    assert child.returncode == 75


def test_stopped_before_it_could_save_is_1(user: User) -> None:
    """Stopped right after it was submitted, before there is a driver that could save."""
    child = user.start("submit", str(user.file), "--to", "ray", *_LONG)
    assert child.stderr is not None
    job = re.search(r"submitted (\S+)", child.stderr.readline())
    assert job is not None
    code, out, err = user.run("submit", "--stop", job[1])
    assert code == 1, (out, err)
    child.communicate(timeout=_TIMEOUT)
    assert child.returncode == 1
