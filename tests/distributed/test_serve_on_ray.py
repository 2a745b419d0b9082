"""`rec-dist serve` with replicas of Ray Serve: a replica that is killed under load costs no request, and SIGTERM ends it all."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from finished_runs import CYCLE, finished_run, raw_item
from http_clients import Client, Reply, assert_same_list, ranked_pairs, until
from real_runs import descendants

import rec_dist
from rec_dist.config.schema import ClusterConfig
from rec_dist.errors import UserError, WorkerFailedError
from rec_dist.launch.ray_cluster import disconnected
from rec_dist.launch.replicas_on_ray import RayReplicas

pytestmark = pytest.mark.slow
pytest.importorskip("grpc_reflection", reason="Ray Serve needs the extra `serve`")
_SECONDS = 240.0


def test_a_replica_is_killed_under_load_and_a_new_run_is_taken_up(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one")
    body = {"history": [raw_item(3), raw_item(4)], "top_k": CYCLE}
    wanted = [(row["item_id"], row["score"]) for row in rec_dist.rank(run, {"u": body["history"]}, top_k=CYCLE).to_pylist()]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    words = (
        "serve",
        run,
        "--port",
        0,
        "--deadline",
        120,
        "cluster.launcher=ray",
        "cluster.num_workers=1",
        "cluster.use_gpu=false",
    )
    log = tmp_path / "err"
    with log.open("wb") as err:
        process = subprocess.Popen([sys.executable, "-m", "rec_dist", *map(str, words)], stderr=err, env=environment)
    try:
        address = r"serving \S+ at http://127\.0\.0\.1:(\d+)/"
        until(lambda: process.poll() is not None or re.search(address, log.read_text()) is not None)
        found = re.search(address, log.read_text())
        assert found is not None, log.read_text()
        client, replies, stop = Client(int(found[1])), list[Reply](), threading.Event()

        def ask() -> None:
            while not stop.is_set():
                replies.append(client.post("/v1/rank", body))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(replies) > 20)

        def retries() -> float:
            found = re.search(r"^rec_dist_serve_retries_total (\S+)$", client.get("/metrics").body, re.MULTILINE)
            assert found is not None
            return float(found[1])

        for _ in range(8):  # until one is lost with a batch; Ray itself waits with what no replica has begun
            (replica,) = descendants(process, "ray::ServeReplica")
            replica.kill()
            killed = len(replies)
            until(lambda: len(replies) > killed + 20)  # noqa: B023
            if retries():
                break
        finished = run / "finished.json"
        finished.write_bytes(finished.read_bytes())
        until(lambda: 'models_total{outcome="taken"} 1.0' in client.get("/metrics").body)
        after = len(replies)
        until(lambda: len(replies) > after + 20)
        stop.set()
        for thread in threads:
            thread.join()
        for reply in replies:
            assert_same_list(ranked_pairs(reply), wanted)
        assert retries() >= 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(_SECONDS) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve, when it is imported here
def test_a_fault_of_any_replica_ends_the_start(tmp_path: Path) -> None:
    """Of two replicas one refuses the model, as where a node lacks a file; which one, chance decides."""
    first = str(tmp_path / "first")

    def load(device: str) -> Any:
        try:
            with open(first, "x"):
                return None
        except FileExistsError:
            raise UserError(f"no model on this node, {device}") from None

    cluster = ClusterConfig(launcher="ray", num_workers=2, use_gpu=False)
    with disconnected(), pytest.raises(UserError, match=r"no model on this node, cpu \(on 1 of 2 replicas\)"):
        RayReplicas(load, cluster, deadline_seconds=5.0, lost=lambda: None)
    assert Path(first).exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve, when it is imported here
def test_a_model_that_cannot_be_loaded_leaves_no_replicas() -> None:
    """They would stay on a cluster that this process has joined, after its end."""

    def load(device: str) -> Any:
        raise KeyError(f"a bug on {device}")

    cluster = ClusterConfig(launcher="ray", num_workers=1, use_gpu=False)
    with disconnected():
        with pytest.raises(WorkerFailedError, match=r"could not load the model: .*a bug on cpu") as fault:
            RayReplicas(load, cluster, deadline_seconds=5.0, lost=lambda: None)
        assert len(str(fault.value).splitlines()) == 1
        from ray import serve

        assert not serve.status().applications
