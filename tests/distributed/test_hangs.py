"""A planted hang of each kind ends with one line that names cluster.hang_seconds. About two minutes; Ray's workers are real.

Training has its own: test_faults.py, test_nodes.py. The limit of a lock in the node's cache: tests/unit/data/test_remote.py.
"""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from real_runs import command, finish, plugged, write_config

pytestmark = pytest.mark.slow

_HERE = {"kind": "slow", "seconds": 3600, "driver": True}
_IN_WORKERS = {"kind": "slow", "seconds": 3600}
_RAY = ("cluster.launcher=ray", "cluster.num_workers=1", "cluster.cpus_per_worker=0.5")


def ended(process: subprocess.Popen[str], *says: str, code: int = 1) -> str:
    """The standard error of a command that hung and was ended."""
    began = time.monotonic()
    found, err = finish(process)
    assert found == code, err
    assert time.monotonic() - began < 300, "soon after its limit"
    begins = "failed: " if code == 1 else "error: "
    lines = [line for line in err.splitlines() if line.startswith(begins)]
    assert len(lines) == 1 and "cluster.hang_seconds" in lines[0], err
    assert not [word for word in says if word not in lines[0]], lines[0]
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("name", ["evaluate", "rank", "embed"])
def test_a_command_that_works_in_its_own_process(trainer: Any, tmp_path: Path, name: str) -> None:
    run, output = trainer.once(), tmp_path / ("out.parquet" if name == "rank" else "out")
    own: dict[str, tuple[Any, ...]] = {
        "evaluate": (run.path, f"evaluate.output_dir={output}"),
        "rank": (run.path, "--top-k", 3, "--out", output),
        "embed": (run.path, output),
    }
    words = (name, *own[name])
    limit = ("cluster.hang_seconds=30",)
    err = ended(command(*words, *limit, **plugged({**_HERE, "phase": f"in {name}"})), "no progress for 3", "stacks in")
    stacks = Path(err.partition("stacks in ")[2].partition(". What was")[0])
    assert "most recent call first" in stacks.read_text(encoding="utf-8"), "what it was doing"
    code, err = finish(command(*words))
    assert code == 0, f"the same command goes on: {err}"


def test_embed_on_ray(trainer: Any, tmp_path: Path) -> None:
    words = ("embed", trainer.once().path, tmp_path / "items", *_RAY)
    ended(command(*words, "cluster.hang_seconds=60", **plugged({**_IN_WORKERS, "phase": "in embed"})), "no progress for 6")
    code, err = finish(command(*words))
    assert code == 0, err


def test_prepare_on_ray(trainer: Any, tmp_path: Path) -> None:
    value = trainer.config(tmp_path / "run", {"data.path": str(tmp_path / "data"), "data.prepare_on": "ray"})
    config = write_config(tmp_path / "config.yaml", value)
    words = ("prepare", config)
    ended(
        command(*words, "cluster.hang_seconds=60", **plugged({**_IN_WORKERS, "phase": "in prepare"})),
        "hang: a job of prepare on Ray: no answer within 60 s",
    )
    assert not (tmp_path / "data").exists()
    code, err = finish(command(*words))
    assert code == 0, err


def test_profile(trainer: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", trainer.config(tmp_path / "run"))
    ended(command("profile", config, "cluster.hang_seconds=30", **plugged({**_HERE, "phase": "in a step"})), "no progress for 3")


_SERVER = """
import time
from rec_dist.config.schema import ClusterConfig
from rec_dist.errors import WorkerFailedError
from rec_dist.launch.ray_cluster import disconnected
from rec_dist.launch.replicas_on_ray import RayReplicas

cluster = ClusterConfig(launcher="ray", num_workers=1, cpus_per_worker=0.5, use_gpu=False, hang_seconds=30)
try:
    with disconnected():
        RayReplicas(lambda device: time.sleep(3600), cluster, deadline_seconds=1, lost=lambda: None)
except WorkerFailedError as fault:
    print(fault)
"""


def test_replicas_of_a_server() -> None:
    """In a process of its own, because Ray Serve warns at its import."""
    pytest.importorskip("grpc_reflection", reason="Ray Serve needs the extra `serve`")
    done = subprocess.run([sys.executable, "-c", _SERVER], capture_output=True, text=True, timeout=300, check=False)
    assert "hang: the replicas have not loaded the model: no answer within 30 s (cluster.hang_seconds)" in done.stdout, (
        done.stderr
    )


@pytest.mark.parametrize(("program", "to"), [("sbatch", "slurm"), ("kubectl", "kuberay")])
def test_a_scheduler_that_does_not_answer(trainer: Any, tmp_path: Path, program: str, to: str) -> None:
    """A program of that name that waits for ever, as on a login node whose controller is gone."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / program).write_text("#!/bin/sh\nexec sleep 3600\n")
    (tools / program).chmod(0o755)
    own = {"submit.storage": str(tmp_path), "submit.kuberay.gpus_per_worker": 0}
    ray = ("cluster.launcher=ray", "cluster.num_workers=1")
    config = write_config(tmp_path / "config.yaml", trainer.config(tmp_path / "run", *ray, own))
    path = f"{tools}:/usr/bin:/bin"
    process = command("submit", config, "--to", to, "cluster.hang_seconds=2", PATH=path)
    ended(process, f"{program} did not answer within 2 s", "before you submit again", code=2)


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for one in kept:
            one.close()


@pytest.mark.parametrize("asked", ["--to", "--follow", "--stop"])
def test_a_job_server_that_does_not_answer(trainer: Any, tmp_path: Path, asked: str) -> None:
    ray = ("cluster.launcher=ray", "cluster.num_workers=1")
    config = write_config(tmp_path / "config.yaml", trainer.config(tmp_path / "run", *ray, {"submit.storage": str(tmp_path)}))
    with silent_server() as address:
        words = (config, "cluster.hang_seconds=2", asked, "ray" if asked == "--to" else "job-1")
        ended(command("submit", *words, RAY_API_SERVER_ADDRESS=address), f"no job server answers at {address}", code=2)


def test_the_limit_of_a_call_is_its_own() -> None:
    """A call that ends in time returns or raises as it is; 0 is no limit."""
    from rec_dist.runtime.limits import each_within, within

    assert within(5, lambda: 3) == within(0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    with pytest.raises(TimeoutError, match=r"within 0\.1 s \(cluster\.hang_seconds\)"):
        within(0.1, lambda: time.sleep(30))
    assert list(each_within(5, iter([1, 2]))) == [1, 2]
