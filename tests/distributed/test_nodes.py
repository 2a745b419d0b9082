"""Nodes that are lost, announced to leave, or come back, on real Ray nodes of one machine. About two minutes each."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_runs import CHANGES, assert_near, assert_same, came_to, command, finish, plugged, undisturbed, wait_until, write_config
from worker_processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.faults]

_ONE_A_NODE = ("cluster.cpus_per_worker=1.0", "cluster.node_wait_seconds=3", "checkpoint.every_steps=5", "train.max_steps=60")
_SLOW = {"kind": "slow", "phase": "in a step", "seconds": 1.0}  # so that a run is still there when a node comes back


class Nodes:
    """A Ray cluster of several nodes on this machine, with one CPU each and a temporary folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {**os.environ, **plugged(_SLOW), "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": self.address}
        self.environment["RAY_memory_monitor_refresh_ms"] = "0"
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        self.joined: list[str] = []  # ids, the head's first; the driver of a run sits on the head

    def start(self) -> subprocess.Popen[bytes]:
        """Starts one more node, the head first. Its processes live as long as it does."""
        head = not self._started
        words = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
        words = [*(words if head else [f"--address={self.address}"]), f"--temp-dir={self._folder}", "--num-cpus=1", "--block"]
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", *words]
        known: set[str] = set() if head else set(self.alive())  # by name: a node that was killed counts for a while
        node = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.environment)
        self._started.append(node)
        deadline = time.monotonic() + 120
        while not (new := set(self.alive()) - known):
            assert node.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        self.joined += new
        return node

    def alive(self) -> list[str]:
        """The ids of the nodes that the head counts, in no order."""
        code = (
            "import json, ray; ray.init(logging_level='ERROR', log_to_driver=False); print(json.dumps([n for n in ray.nodes()]))"
        )
        deadline = time.monotonic() + 120
        while True:  # a head that has just been started does not answer yet
            done = subprocess.run([sys.executable, "-c", code], env=self.environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return [node["NodeID"] for node in json.loads(done.stdout.splitlines()[-1]) if node["Alive"]]
            assert time.monotonic() < deadline, done.stderr

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kills all processes of a node at once, as when the machine loses power."""
        processes = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def announce(self, node_id: str) -> None:
        """Announces that a node is about to be taken away, as a cloud does for a spot machine."""
        words = ["drain-node", "--address", self.address, "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        words += ["--reason-message", "a test", "--deadline-remaining-seconds", "90"]
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *words], env=self.environment, check=True, capture_output=True
        )

    def close(self) -> None:
        for node in reversed(self._started):
            if node.poll() is None:
                self.kill(node)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    # The folder is its own, or any ray.init() on this machine would join. Its name is short, since it holds sockets.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = Nodes(Path(folder))
        try:
            yield cluster
        finally:
            cluster.close()


def environment(nodes: Nodes) -> dict[str, str]:
    return {name: nodes.environment[name] for name in ("RAY_AUTH_MODE", "RAY_ADDRESS")}


def events(run: Any) -> list[str]:
    return [row["event"] for row in run.rows if row["event"] in ("restart", "resume", "resize")]


def test_a_lost_node_and_one_that_comes_back(trainer: Any, tmp_path: Path, nodes: Nodes, record: dict[str, Any]) -> None:
    """Two workers, then one, then two again. The parameters equal those of two workers throughout, within 1e-5."""
    record.update(fault="SIGKILL", where="a node, with cluster.min_workers; later another joins")
    changes = (*CHANGES, *_ONE_A_NODE, "cluster.min_workers=1")
    run_dir = tmp_path / "run"
    nodes.start()
    lost = nodes.start()
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *changes))
    process = command("train", config, **environment(nodes))
    wait_until(came_to(run_dir, 7), process)
    nodes.kill(lost)
    log = run_dir / "log.txt"
    wait_until(lambda: "starting 1 worker with" in log.read_text(encoding="utf-8"), process)
    wait_until(came_to(run_dir, 8), process)
    nodes.start()
    code, err = finish(process)
    assert code == 0, err
    assert "room for 1 more worker(s)" in err
    run = type(undisturbed(trainer, *_ONE_A_NODE))(run_dir)
    assert events(run) == ["restart", "resume", "resize", "resume"], err
    assert run.log.count("starting 2 workers with") == 2
    assert_near(run, undisturbed(trainer, *_ONE_A_NODE))
    record.update(restarts=1, outcome="goes on with 1 worker, grows back at a checkpoint: same parameters within 1e-5")


def test_a_node_that_is_announced_to_leave(trainer: Any, tmp_path: Path, nodes: Nodes, record: dict[str, Any]) -> None:
    """The run saves and ends with 75; with another node the same command resumes bit for bit."""
    record.update(fault="preemption", where="a node")
    changes = (*CHANGES, *_ONE_A_NODE, "train.max_steps=20")
    run_dir = tmp_path / "run"
    nodes.start()
    leaving = nodes.start()
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *changes))
    process = command("train", config, **environment(nodes))
    wait_until(came_to(run_dir, 2), process)
    nodes.announce(nodes.joined[-1])
    code, err = finish(process)
    assert code == 75, err
    assert "1 node(s) are being taken away; saving a checkpoint, then stopping" in err
    nodes.kill(leaving)
    nodes.start()
    code, err = finish(command("train", config, **environment(nodes)))
    assert code == 0, err
    expected = undisturbed(trainer, *_ONE_A_NODE, "train.max_steps=20")
    run = type(expected)(run_dir)
    assert events(run) == ["resume"]
    assert_same(run, expected)
    record.update(outcome="exit 75 with a checkpoint; run again: same parameters, bit for bit")


def test_with_enough_left_a_node_may_leave(trainer: Any, tmp_path: Path, nodes: Nodes, record: dict[str, Any]) -> None:
    record.update(fault="preemption", where="a node, with cluster.min_workers")
    changes = (*CHANGES, *_ONE_A_NODE, "train.max_steps=20", "cluster.min_workers=1")
    run_dir = tmp_path / "run"
    nodes.start()
    nodes.start()
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *changes))
    process = command("train", config, **environment(nodes))
    wait_until(came_to(run_dir, 2), process)
    nodes.announce(nodes.joined[-1])
    code, err = finish(process)
    assert code == 0, err
    expected = undisturbed(trainer, *_ONE_A_NODE, "train.max_steps=20")
    run = type(expected)(run_dir)
    assert events(run) == ["resize", "resume"]
    assert_near(run, expected)
    record.update(outcome="saves, goes on with 1 worker: same parameters within 1e-5")


def test_a_hang_on_another_node_leaves_its_stacks(trainer: Any, tmp_path: Path, nodes: Nodes, record: dict[str, Any]) -> None:
    """Each rank has a node of its own. Rank 1 is stopped; both write their stacks, the one that is not the driver's through Ray."""
    record.update(fault="SIGSTOP", where="a worker on another node than the driver's")
    run_dir, marker = tmp_path / "run", tmp_path / "struck"
    fault = {"kind": "SIGSTOP", "phase": "in a step", "rank": 1, "call": 5, "marker": str(marker)}
    nodes.environment |= plugged(fault)
    nodes.start()
    nodes.start()
    changes = (*CHANGES, "cluster.cpus_per_worker=1.0", "cluster.hang_seconds=60")
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *changes))
    code, err = finish(command("train", config, **environment(nodes)))
    assert marker.exists() and code == 0, err
    places = [json.loads((run_dir / "attempt" / f"rank-{rank}.json").read_text(encoding="utf-8"))["node"] for rank in (0, 1)]
    assert sorted(places) == sorted(nodes.joined), "one rank a node"
    stacks = [(run_dir / "stacks" / f"rank-{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert all("most recent call first" in stack and "in train_worker" in stack for stack in stacks)
    assert "stopped by a signal" in stacks[1] and "stopped by a signal" not in stacks[0]
    run = type(undisturbed(trainer))(run_dir)
    assert events(run) == ["restart", "resume"], err
    assert_same(run, undisturbed(trainer))
    record.update(restarts=1, outcome="stacks of both; same parameters, bit for bit")
