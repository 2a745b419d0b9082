"""Four Ray nodes with their own addresses, a job of four ZeRO-3 workers on them, and one node that dies. About four minutes.

The nodes are network namespaces of this machine (namespaces.py): they share its disk, as nodes share storage, but nothing
else of the network. A service that binds the wrong address, or can only be found on this host, fails here as it would on a
cluster.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from namespaces import Network, available
from real_runs import assert_near, plugged
from safetensors.torch import load_file

pytestmark = [pytest.mark.launch, pytest.mark.skipif(not available(), reason="needs root and network namespaces (iproute2)")]

_NODES = 4
_TIMEOUT = 600.0  # a job takes a minute on two free cores
_SLOW = {"kind": "slow", "phase": "in a step", "seconds": 0.5}  # so that a node can die in the middle
_TIMES = ("tokens_per_second", "step_seconds", "data_seconds", "mfu")
_CHANGES = (
    "task.kind=sdpo",
    "cluster.launcher=ray",
    f"cluster.num_workers={_NODES}",
    "cluster.min_workers=3",
    "cluster.cpus_per_worker=1.0",
    "cluster.node_wait_seconds=5",
    "cluster.zero_stage=3",
    "train.max_steps=30",
    "train.epochs=20",
    "train.max_tokens_per_micro_batch=2048",
    "checkpoint.every_steps=5",
    "optimizer.eps=1e-4",  # above the noise of float32 sums, which Adam would blow up
)


class Cluster:
    """A head and three nodes that have joined it, one CPU each."""

    def __init__(self, folder: Path, network: Network) -> None:
        self._folder, self._network = folder, network
        self._nodes: list[subprocess.Popen[bytes]] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
        self.environment = {
            **kept,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._head = f"{network.address(0)}:6379"

    @property
    def dashboard(self) -> str:
        """The job server's address."""
        return f"http://{self._network.address(0)}:8265"

    def start(self) -> None:
        """Returns when all nodes have joined."""
        for host in range(_NODES):
            place = self._folder / str(host)
            place.mkdir()
            words = [f"--node-ip-address={self._network.address(host)}", f"--temp-dir={place}", "--num-cpus=1", "--block"]
            words += ["--object-store-memory=80000000"]
            head = ["--head", "--port=6379", "--include-dashboard=true", "--dashboard-host=0.0.0.0"]
            words += head if host == 0 else [f"--address={self._head}"]
            # gloo would look up this host's name, whose address belongs to no namespace
            own = {"GLOO_SOCKET_IFNAME": "eth0", "RAY_memory_monitor_refresh_ms": "0", **plugged(_SLOW)}
            log = self._folder / f"node-{host}.txt"
            self._nodes.append(
                self._network.start(host, "ray", "start", *words, environment={**self.environment, **own}, output=log)
            )
            self._wait(lambda wanted=host + 1: self.alive() == wanted, f"node {host} joins")

    def alive(self) -> int:
        """How many nodes the head counts; 0 if it does not answer."""
        code = "import ray; ray.init(log_to_driver=False, logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
        done = self._network.run(0, "python", "-c", code, environment={**self.environment, "RAY_ADDRESS": self._head})
        return int(done.stdout.split()[-1]) if done.returncode == 0 else 0

    def kill(self, host: int) -> None:
        """Kills every process of a node at once, as when it loses power."""
        node = self._nodes[host]
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def close(self) -> None:
        for host in reversed(range(len(self._nodes))):
            if self._nodes[host].poll() is None:
                self.kill(host)

    def _wait(self, what: Callable[[], bool], why: str) -> None:
        until = time.monotonic() + _TIMEOUT
        while not what():
            told = {path.name: path.read_text(errors="replace")[-2000:] for path in self._folder.glob("node-*.txt")}
            assert all(node.poll() is None for node in self._nodes), (why, told)
            assert time.monotonic() < until, (why, told)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder, network = Path(tempfile.mkdtemp(prefix="n4", dir="/tmp")), Network(_NODES)  # short, for Ray's sockets
    started = Cluster(folder, network)
    try:
        network.open()
        started.start()
        yield started
    finally:
        started.close()
        network.close()
        shutil.rmtree(folder, ignore_errors=True)


class Job:
    """A submitted run."""

    def __init__(self, cluster: Cluster, file: Path, run_dir: Path) -> None:
        self.run_dir = run_dir
        words = [sys.executable, "-m", "rec_dist", "submit", str(file), "--to", "ray", f"train.run_dir={run_dir}"]
        environment = {
            **cluster.environment,
            "RAY_API_SERVER_ADDRESS": cluster.dashboard,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.process = subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    @property
    def beats(self) -> list[dict[str, Any]]:
        """The address of each rank."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((self.run_dir / "attempt").glob("rank-*.json"))]

    def came_to(self, step: int) -> None:
        until = time.monotonic() + _TIMEOUT
        while not any(row["event"] == "step" and row["step"] >= step for row in self.rows):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """(exit code, what it printed)."""
        try:
            out, err = self.process.communicate(timeout=_TIMEOUT)
        finally:
            self.process.kill()
        return self.process.returncode, out + err

    def result(self) -> Any:
        """The steps without times, and the weights."""
        steps = [{key: value for key, value in row.items() if key not in _TIMES} for row in self.rows if row["event"] == "step"]
        return SimpleNamespace(steps=steps, weights=load_file(next((self.run_dir / "model").glob("*.safetensors"))))


def test_a_node_of_four_dies_and_the_run_goes_on_with_three(
    tmp_path: Path, cluster: Cluster, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    file = tmp_path / "run.yaml"
    config = {**tiny_config(tmp_path / "unused", *_CHANGES), "submit": {"ray": {"ship": "source"}}}
    file.write_text(yaml.safe_dump(config), encoding="utf-8")

    whole = Job(cluster, file, tmp_path / "whole")
    whole.came_to(2)
    assert len({beat["node"] for beat in whole.beats}) == _NODES, "a worker a node"
    code, printed = whole.end()
    assert code == 0, printed
    assert [row["event"] for row in whole.rows if row["event"] in ("restart", "resume", "resize")] == []

    robbed = Job(cluster, file, tmp_path / "robbed")
    robbed.came_to(12)
    assert len({beat["node"] for beat in robbed.beats}) == _NODES
    cluster.kill(_NODES - 1)
    code, printed = robbed.end()
    assert code == 0, printed
    assert "starting 3 workers" in printed
    assert [row["event"] for row in robbed.rows if row["event"] in ("restart", "resume", "resize")] == ["restart", "resume"]
    assert next(row["step"] for row in robbed.rows if row["event"] == "resume") == 10, "from the newest checkpoint"
    assert_near(robbed.result(), whole.result())
