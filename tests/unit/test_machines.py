"""What a machine lacks: short paths, a writable temporary folder, a cluster that answers, a locale."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rec_dist.errors import UserError
from rec_dist.launch.ray_cluster import address_of, check_answers, temp_folder
from rec_dist.launch.ray_metrics import label
from rec_dist.runtime.packages import CACHE_VARIABLE, cache_dir


def test_a_short_writable_folder_is_rays_own_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(f"/tmp/rd-{tmp_path.name[:8]}-{threading.get_native_id()}")
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    assert temp_folder() is None
    assert (short / "ray").is_dir()
    (short / "ray").rmdir()
    short.rmdir()


@pytest.mark.parametrize("name", ["x" * 60, "läufe", "file"])
def test_another_folder_is_taken_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / name))
    with caplog.at_level(logging.WARNING):
        assert temp_folder() in ("/tmp/ray", "/var/tmp/ray", "/dev/shm/ray")
    assert str(tmp_path / name) in caplog.text


def test_no_folder_at_all_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    monkeypatch.setattr("rec_dist.launch.ray_cluster._MOST_BYTES", 3)
    with pytest.raises(UserError, match="set RAY_TMPDIR to a writable folder"):
        temp_folder()


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "no.such.host.invalid:6379", "[::1]:{port}"])
def test_an_address_that_does_not_answer(address: str) -> None:
    with socket.socket() as taken:  # bound and not listening: nothing else gets this port meanwhile
        taken.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(UserError, match=r"cluster\.address .* no Ray cluster answers there"):
            check_answers(address.format(port=taken.getsockname()[1]))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("key", "variable", "joined"),
    [
        (None, None, None),
        (None, "local", None),
        ("local", "head:6379", None),
        (None, "", None),
        (None, "head:6379", "head:6379"),
        ("auto", "local", "auto"),
        ("other:6379", "head:6379", "other:6379"),
    ],
)
def test_which_cluster_is_joined(
    key: str | None, variable: str | None, joined: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert address_of(key) == joined


@pytest.mark.parametrize("address", ["auto", "host-without-port"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    check_answers(address)


def test_names_for_ray_are_ascii() -> None:
    assert label("läufe-1") == "l\\xe4ufe-1"
    assert label("run") == "run"


def test_output_is_utf_8_in_every_locale(tmp_path: Path) -> None:
    config = tmp_path / "größe.yaml"
    config.write_text("x: [", encoding="utf-8")
    code = "\n".join(
        [
            "import sys",
            "from rec_dist.cli import main",
            "from rec_dist.runtime.messages import say",
            f"code = main(['train', {str(config)!a}])",
            f"say({'größe 東京'!a})",
            "sys.exit(code)",
        ]
    )
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert done.returncode == 2, done.stderr.decode()
    assert done.stdout.decode("utf-8") == "größe 東京\n"
    assert done.stderr.decode().count("\n") == 1 and done.stderr.startswith(b"error: ")


def test_without_a_home_folder_there_is_still_one_line(tmp_path: Path) -> None:
    """`run` draws figures, and matplotlib would tell of the folder that it cannot make."""
    config = tmp_path / "pipeline.yaml"
    config.write_text("pipeline: {title: T, run_dir: report, stages: []}", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": "/no/such/home"}
    words = [sys.executable, "-P", "-m", "rec_dist", "run", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def test_a_cache_without_a_home_folder_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match=f"set {CACHE_VARIABLE}"):
        cache_dir()


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_server_that_is_no_ray_head(monkeypatch: pytest.MonkeyPatch, says: bytes) -> None:
    """One that accepts and says nothing, and one of the web."""
    monkeypatch.setattr("rec_dist.launch.ray_cluster._CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.sendall(says)
                connection.recv(1 << 16)
                time.sleep(1.0)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UserError, match="no Ray cluster answers there"):
            check_answers(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()


@pytest.mark.slow
def test_a_run_outside_ascii_with_a_long_temporary_folder(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    run, long = tmp_path / "läufe-東京", tmp_path / ("x" * 60)
    long.mkdir()
    config = tmp_path / "größe.yaml"
    changes = ("cluster.launcher=ray", "cluster.num_workers=1", "train.max_steps=1")
    config.write_text(yaml.safe_dump(tiny_config(run, *changes), allow_unicode=True), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(long)}
    environment["RAY_ADDRESS"] = "local"
    words = [sys.executable, "-P", "-m", "rec_dist", "train", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"WARNING: Ray's temporary folder {long}/ray has a path of" in done.stderr
    assert (run / "finished.json").is_file()
    assert not list(run.glob("stacks/*"))


@pytest.mark.slow
def test_a_ray_head_answers() -> None:
    """In a process of its own, which ends with the cluster."""
    code = "; ".join(
        [
            "import sys, ray",
            "from rec_dist.launch.ray_cluster import check_answers, connect",
            "connect(None)",
            "check_answers(ray.get_runtime_context().gcs_address)",
            "sys.stdout.write('answers')",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "answers", done.stderr
