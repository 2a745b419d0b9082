"""The gauges of a real run, read where Prometheus reads them: at a Ray node's metrics port. About a minute."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_runs import CHANGES, came_to, command, finish, plugged, wait_until, write_config
from worker_processes import free_port

from rec_dist.launch.ray_metrics import EXPORTED, MEASURES

pytestmark = pytest.mark.slow

_SLOW = {"kind": "slow", "phase": "in a step", "seconds": 4.0}  # longer than Ray takes to collect what a step has set
_LINE = re.compile(r"^(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)


class Node:
    """A Ray cluster of one node with a metrics port that the test chooses."""

    def __init__(self, folder: Path) -> None:
        self.address, self.metrics = f"127.0.0.1:{free_port()}", free_port()
        fast = {"RAY_metrics_report_interval_ms": "1000", "RAY_AUTH_MODE": "disabled", "RAY_memory_monitor_refresh_ms": "0"}
        self.environment = {**plugged(_SLOW), **fast, "RAY_ADDRESS": self.address}
        words = ["--head", f"--port={self.address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
        words += ["--include-dashboard=false", f"--metrics-export-port={self.metrics}", "--num-cpus=2", "--block"]
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", *words]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(line, stdout=quiet, stderr=quiet, env={**os.environ, **self.environment})

    def scrape(self) -> str:
        """Everything that the node serves to Prometheus now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            return str(answer.read().decode("utf-8"))

    def gauges(self, run: str) -> dict[str, float]:
        """The gauges of a run, by name."""
        lines = _LINE.findall(self.scrape())
        return {name: float(value) for name, labels, value in lines if f'run="{run}"' in labels}

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                self.scrape()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)

    def close(self) -> None:
        processes = [*psutil.Process(self._process.pid).children(recursive=True), psutil.Process(self._process.pid)]
        for process in processes:
            if process.is_running():
                process.kill()
        self._process.wait()


@pytest.fixture
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        started = Node(Path(folder))
        try:
            started.wait_until_it_answers()
            yield started
        finally:
            started.close()


def row_of(run_dir: Path, step: int) -> dict[str, Any]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return next(row for row in rows if row["event"] == "step" and row["step"] == step)


def test_a_run_of_two_workers_serves_the_numbers_of_its_rows(trainer: Any, tmp_path: Path, node: Node) -> None:
    run_dir = tmp_path / "gauged"
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *CHANGES))
    process = command("train", config, **node.environment)
    wait_until(came_to(run_dir, 2), process)
    seen: dict[int, dict[str, float]] = {}
    deadline = time.monotonic() + 120
    while len(seen) < 3 and process.poll() is None:
        assert time.monotonic() < deadline, node.scrape()[-2000:]
        found = node.gauges("gauged")
        if set(found) == set(EXPORTED):
            seen[int(found["ray_rec_dist_step"])] = found
        time.sleep(0.5)
    (run_dir / "stop").write_text("", encoding="utf-8")
    code, err = finish(process)
    assert code == 75, err
    # A scrape may fall between two gauges of one step, but most of several steps are whole.
    whole = [step for step, found in seen.items() if found == expected(row_of(run_dir, step))]
    assert len(whole) >= 2, (seen, [expected(row_of(run_dir, step)) for step in seen])


def expected(row: dict[str, Any]) -> dict[str, float]:
    facts = {**row, "restarts": 0, "workers": 2}
    return {name: float(measure.value(facts) or 0.0) for name, measure in zip(EXPORTED, MEASURES, strict=True)}
