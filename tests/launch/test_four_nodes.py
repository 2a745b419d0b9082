"""Four Ray nodes with their own addresses, a job of four ZeRO-3 workers on them, and one node that dies. About four minutes.

The nodes are network namespaces of this machine (namespaces.py): they share its disk, as nodes share storage, but nothing
else of the network. A service that binds the wrong address, or can only be found on this host, fails here as it would on a
cluster.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from namespaces import available
from ray_nodes import TIMEOUT_SECONDS, RayNodes
from real_runs import assert_near, plugged
from safetensors.torch import load_file

pytestmark = [pytest.mark.launch, pytest.mark.skipif(not available(), reason="needs root and network namespaces (iproute2)")]

_NODES = 4
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    with RayNodes.opened(_NODES, **plugged(_SLOW)) as nodes:
        nodes.join(_NODES)
        yield nodes


class Job:
    """A submitted run."""

    def __init__(self, cluster: RayNodes, file: Path, run_dir: Path) -> None:
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
        until = time.monotonic() + TIMEOUT_SECONDS
        while not any(row["event"] == "step" and row["step"] >= step for row in self.rows):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """(exit code, what it printed)."""
        try:
            out, err = self.process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, out + err

    def result(self) -> Any:
        """The steps without times, and the weights."""
        steps = [{key: value for key, value in row.items() if key not in _TIMES} for row in self.rows if row["event"] == "step"]
        return SimpleNamespace(steps=steps, weights=load_file(next((self.run_dir / "model").glob("*.safetensors"))))


def test_a_node_of_four_dies_and_the_run_goes_on_with_three(
    tmp_path: Path, cluster: RayNodes, tiny_config: Callable[..., dict[str, Any]]
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
