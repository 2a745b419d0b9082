"""Training, evaluation and prepare with data in an object store equal those on a folder; a lost store is one clear line."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from s3_server import CREDENTIALS, S3Server, running
from safetensors.torch import load_file
from worker_processes import start

from rec_dist.cli import main

Make = Callable[..., dict[str, Any]]
_TIMES = ("tokens_per_second", "step_seconds", "data_seconds", "mfu", "seconds")


@pytest.fixture
def server() -> Iterator[S3Server]:
    with running() as own:
        yield own


@pytest.fixture
def command(tmp_path: Path, tiny_config: Make) -> Callable[..., tuple[int, str]]:
    """Runs a command on a configuration with its run directory under `name`, in a process of its own: (exit code, its errors)."""

    def run(words: str, name: str, *changes: Any) -> tuple[int, str]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_config(tmp_path / name, "task.kind=sdpo", *changes)), encoding="utf-8")
        target = str(path) if words != "evaluate" else str(tmp_path / name)
        child = start(main, [words, target], folder=tmp_path / f"{name}-out", environment=CREDENTIALS)
        return child.wait(), child.err

    return run


def rows(run: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in found if row["event"] == event]


def wait_for_steps(run: Path, count: int) -> None:
    end = time.monotonic() + 150
    while time.monotonic() < end and (not (run / "metrics.jsonl").is_file() or len(rows(run, "step")) < count):
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.quick
def test_a_run_on_remote_data_is_the_run_on_local_data(
    server: S3Server, command: Callable[..., tuple[int, str]], tiny_data: Path, tmp_path: Path
) -> None:
    remote = {"data.path": server.put(tiny_data, "tiny"), "data.cache_dir": str(tmp_path / "cache")}
    assert command("train", "local")[0] == 0
    assert command("train", "remote", remote, "train.max_steps=4")[0] == 0
    local_run, remote_run = tmp_path / "local", tmp_path / "remote"
    assert rows(remote_run, "step") == rows(local_run, "step")
    weights = [load_file(run / "model" / "adapter_model.safetensors") for run in (local_run, remote_run)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert (remote_run / "model" / "items.arrow").read_bytes() == (tiny_data / "items.arrow").read_bytes()
    for run in (local_run, remote_run):
        assert command("evaluate", run.name)[0] == 0
    found = [{**rows(run, "evaluation")[0], "name": ""} for run in (local_run, remote_run)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_place_of_the_data_may_change_between_attempts_and_the_data_may_not(
    server: S3Server, command: Callable[..., tuple[int, str]], tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "moved"
    long = {"train.max_steps": 100, "train.epochs": 50}
    assert command("train", "whole", long)[0] == 0

    def stop() -> None:
        wait_for_steps(run, 3)
        (run / "stop").touch()

    thread = threading.Thread(target=stop)
    thread.start()
    assert command("train", "moved", long)[0] == 75
    thread.join()
    more_shards = {**long, "data.path": server.uri("again"), "data.num_shards": 5, "data.cache_dir": str(tmp_path / "cache")}
    assert command("prepare", "moved", more_shards)[0] == 0
    assert command("train", "moved", more_shards)[0] == 0
    assert rows(run, "step") == rows(tmp_path / "whole", "step")
    assert command("prepare", "moved", {**more_shards, "data.path": server.uri("other"), "data.min_user_interactions": 6})[0] == 0
    code, error = command("train", "moved", {**more_shards, "data.path": server.uri("other")})
    assert (code, "was started from other data" in error) == (2, True), error


def test_prepare_writes_to_a_store_once(
    server: S3Server, command: Callable[..., tuple[int, str]], tiny_data: Path, tmp_path: Path
) -> None:
    remote = {"data.path": server.uri("new"), "data.cache_dir": str(tmp_path / "cache")}
    server.write("new/train-00000-of-00002.arrow", b"what a broken upload left")
    assert command("prepare", "x", remote)[0] == 0
    for path in tiny_data.iterdir():
        assert server.read(f"new/{path.name}") == path.read_bytes()
    code, error = command("prepare", "x", remote)
    assert (code, "already prepared" in error) == (0, True), error
    code, error = command("prepare", "x", remote, "data.num_shards=3")
    assert (code, "in 2 shards per split, and data.num_shards is 3" in error) == (2, True), error
    server.write("full/thesis.txt", b"years of work")
    code, error = command("prepare", "x", {**remote, "data.path": server.uri("full")})
    assert (code, "holds other files (thesis.txt)" in error) == (2, True), error
    assert not list((tmp_path / "cache").glob("prepare-*"))


@pytest.mark.slow
def test_a_store_that_goes_in_the_middle_of_a_run_is_one_line_and_the_run_goes_on_later(
    server: S3Server, command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    many = {"data.path": str(tmp_path / "many"), "data.num_shards": 30}
    assert command("prepare", "run", many)[0] == 0
    room = max(path.stat().st_size for path in (tmp_path / "many").glob("*.arrow"))  # for a few shards: steps fetch again
    remote = {
        **many,
        "data.path": server.put(tmp_path / "many", "tiny"),
        "data.cache_dir": str(tmp_path / "cache"),
        "data.cache_bytes": room,
        "task.reference": "online",
        "train.epochs": 50,
        "train.max_steps": 120,
    }

    def kill_after_the_first_steps() -> None:
        wait_for_steps(run, 3)
        server.kill()

    thread = threading.Thread(target=kill_after_the_first_steps)
    thread.start()
    code, printed = command("train", "run", remote)
    thread.join()
    error = [line for line in printed.splitlines() if line.startswith("failed:")]
    assert (code, len(error), "Traceback" in printed) == (1, 1, False), printed
    assert error[0].startswith("failed: s3://rec-dist-tests/tiny/")
    assert "run the same command again" in error[0]
    done = len(rows(run, "step"))
    assert 3 <= done < 120
    assert command("train", "run", {**remote, "data.path": many["data.path"]})[0] == 0
    assert [row["step"] for row in rows(run, "step")] == list(range(1, 121))
