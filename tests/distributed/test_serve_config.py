"""The serveConfigV2 of a RayService on a real Ray cluster of one node, sent as the KubeRay operator sends it. Some minutes."""

import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import CYCLE, finished_run, other_run, point, raw_item
from http_clients import Client, Reply, assert_same_list, ranked_pairs, serving, until
from worker_processes import free_port

from rec_dist.cli import main
from rec_dist.commands.serve import TOKEN_VARIABLE

pytestmark = pytest.mark.slow
pytest.importorskip("grpc_reflection", reason="Ray Serve needs the extra `serve`")

TOKEN = secrets.token_hex(32)
BODY = {"history": [raw_item(3), raw_item(4)], "top_k": CYCLE}


class Cluster:
    """A Ray cluster of one node with a dashboard and a token, as the operator starts one. http_port: for its first configuration."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._token, self._port = folder, secrets.token_hex(32), free_port()
        self.http_port = free_port()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            TOKEN_VARIABLE: TOKEN,
        }
        ports = [f"--port={free_port()}", f"--dashboard-port={self._port}", f"--dashboard-agent-listen-port={free_port()}"]
        words = [
            "--head",
            "--block",
            "--num-cpus=2",
            "--num-gpus=0",
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={folder}",
            *ports,
        ]
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", *words]
        with (folder / "start.txt").open("w") as log:
            self.process = subprocess.Popen(line, env=environment, stdout=log, stderr=log)

    def _ask(self, method: str, body: Any = None) -> Any:
        """What the dashboard answers; None while nothing does."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            connection.request(method, "/api/serve/applications/", None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except OSError:
            assert self.process.poll() is None, "the node ended"
            return None
        finally:
            connection.close()
        assert answer.status == 200, text
        return json.loads(text) if text else {}

    def wait_until_it_answers(self) -> None:
        until(lambda: self._ask("GET") is not None)

    def apply(self, config: Any) -> None:
        """Sends the configuration of Ray Serve."""
        self._ask("PUT", config)

    def application(self) -> Any:
        """The state of the one application."""
        return self._ask("GET")["applications"].get("rec-dist", {})

    def logs(self) -> str:
        """What Ray Serve has logged of all replicas."""
        files = (self._folder / "session_latest" / "logs" / "serve").glob("replica_*")
        return "".join(path.read_text(encoding="utf-8") for path in files)

    def wait_until_it_runs(self) -> None:
        def runs() -> bool:
            found = self.application()
            assert found.get("status") != "DEPLOY_FAILED", found["message"]
            return bool(found.get("status") == "RUNNING")

        until(runs)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))  # short, for Ray's sockets
    cluster = Cluster(folder)
    try:
        cluster.wait_until_it_answers()
        yield cluster
    finally:
        cluster.process.terminate()
        cluster.process.wait(timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def serve_config(run: Path, port: int, *overrides: str) -> Any:
    """The serveConfigV2 for a run, with two replicas, at another port."""
    words = [f"train.run_dir={run}", f"submit.storage={run.parent}", "submit.command=serve", "submit.kuberay.token_secret=a"]
    words += ["submit.kuberay.workers=2", "submit.kuberay.cpus_per_worker=1", "submit.kuberay.gpus_per_worker=0"]
    out = StringIO()
    with redirect_stdout(out):
        assert main(["submit", str(run / "config.yaml"), "--to", "kuberay", "--dry-run", *words, *overrides]) == 0
    config = yaml.safe_load(yaml.safe_load(out.getvalue())["spec"]["serveConfigV2"])
    config["http_options"]["port"] = port
    return config


def test_a_service_answers_as_the_command_and_takes_up_other_models_under_load(cluster: Cluster, tmp_path: Path) -> None:
    """A link that leads to another run, then another run in the configuration: no request fails in either."""
    run = finished_run(tmp_path / "one")
    other = other_run(run, tmp_path / "other")
    link = tmp_path / "current"
    link.symlink_to(run)
    wanted, scores = {}, {}
    candidates = {"user_id": "005", "candidates": ["03", "nothing", "04"]}
    for path in (run, other):
        with serving(path) as local:
            reply = local.post("/v1/rank", BODY)
            wanted[reply.body["model"]] = ranked_pairs(reply)
            scores[reply.body["model"]] = local.post("/v1/score", candidates).body["scores"]
    (first, second), port = wanted, cluster.http_port
    cluster.apply(serve_config(link, port))
    cluster.wait_until_it_runs()
    client = Client(port, TOKEN)
    assert Client(port).post("/v1/rank", BODY).status == 401
    assert client.get("/").status == 200
    assert_same_list(ranked_pairs(client.post("/v1/rank", BODY)), wanted[first])
    assert client.post("/v1/score", candidates).body["scores"] == pytest.approx(scores[first], abs=1e-4)
    assert client.post("/v1/rank", {"history": "03"}).status == 422
    replies, stop = list[Reply](), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            replies.append(client.post("/v1/rank", BODY))

    def settled(model: str) -> bool:
        latest = replies[-60:]
        return len(latest) == 60 and {reply.body.get("model") for reply in latest} == {model}

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: settled(first))
        point(link, other)
        until(lambda: settled(second))
        cluster.apply(serve_config(run, port))
        until(lambda: cluster.application()["status"] == "DEPLOYING")
        cluster.wait_until_it_runs()
        until(lambda: settled(first))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for reply in replies:
        assert_same_list(ranked_pairs(reply), wanted[reply.body["model"]])
    assert f"serving model {second}; before it was {first}" in cluster.logs()


def test_a_replica_turns_away_itself_what_its_queue_does_not_hold(cluster: Cluster, tmp_path: Path) -> None:
    run, port = finished_run(tmp_path / "one"), cluster.http_port
    cluster.apply(serve_config(run, port, "submit.kuberay.workers=1", "submit.serve.queue=4"))
    client = Client(port, TOKEN)
    until(lambda: cluster.application()["status"] == "DEPLOYING")
    cluster.wait_until_it_runs()
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: client.post("/v1/rank", BODY), range(800)))
    counts = Counter(reply.status for reply in replies)
    assert set(counts) == {200, 429}, counts
    assert all("try again" in reply.body["error"] and "retry-after" in reply.headers for reply in replies if reply.status == 429)


def test_a_run_that_is_not_finished_is_named_in_the_state(cluster: Cluster, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one")
    config = serve_config(run, cluster.http_port)
    (run / "finished.json").unlink()
    cluster.apply(config)
    until(lambda: cluster.application().get("status") == "DEPLOY_FAILED")
    assert f"{run} is not finished" in cluster.application()["message"]
