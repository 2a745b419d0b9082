"""Trackers offline, each read back from the files it wrote; missing packages; trackers that fail. Skips what is not installed."""

import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from worker_processes import free_port

from rec_dist.config.track import TrackConfig
from rec_dist.errors import UserError
from rec_dist.training.trackers import Trackers, build_tracker, check_trackers, scalars

ROWS = [
    {"event": "step", "step": step, "epoch": 0, "loss": 1.0 / step, "rewards/margins": 0.5 * step, "mfu": None, "restarts": 0}
    for step in (1, 2)
]
CONFIG = {"optimizer.lr": 1e-4, "task.kind": "sdpo", **{f"train.key{number}": number for number in range(120)}}


def tracked(folder: Path, said: list[str], rows: list[dict[str, Any]] = ROWS, **keys: Any) -> None:
    """Trackers of one attempt at a run: started, given the rows, closed."""
    folder.mkdir(exist_ok=True)
    trackers = build_tracker(TrackConfig(**keys), folder, CONFIG, said.append)
    for row in rows:
        trackers.log(row)
    trackers.close()


def test_numbers_alone_are_sent() -> None:
    assert scalars(ROWS[0]) == {"train/loss": 1.0, "train/rewards/margins": 0.5, "train/restarts": 0}


def test_tensorboard_has_every_number_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    said: list[str] = []
    tracked(tmp_path, said, tensorboard=True)
    data = next((tmp_path / "tensorboard").glob("events.*")).read_bytes()
    found, place = {}, 0
    while place < len(data):  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        (length,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        found.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
        place += length + 16
    expected = {(name, row["step"]): value for row in ROWS for name, value in scalars(row).items()}
    assert found == expected
    assert said == []


def test_wandb_offline_writes_into_the_run_directory_and_a_restart_keeps_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    said: list[str] = []
    for _ in range(2):
        tracked(tmp_path, said, wandb="offline", project="films")
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1, "both attempts are one run"
    wanted = (b"films", b"train/loss", b"train/rewards/margins", b"optimizer.lr", tmp_path.name.encode())
    deadline = time.monotonic() + 60  # W&B's own process writes the file, and may be late on a busy machine
    for folder in folders:
        path = next(folder.glob("*.wandb"))
        while missing := [text for text in wanted if text not in path.read_bytes()]:
            assert time.monotonic() < deadline, missing
            time.sleep(0.2)
    assert said == []


def test_mlflow_offline_has_every_number_and_a_restart_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)  # and back as it was, afterwards
    said: list[str] = []
    later = [{**row, "step": row["step"] + 2} for row in ROWS]
    tracked(tmp_path, said, mlflow="offline", project="films")
    tracked(tmp_path, said, rows=later, mlflow="offline", project="films")
    client = mlflow.MlflowClient(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    runs = client.search_runs([client.get_experiment_by_name("films").experiment_id])
    assert len(runs) == 1
    assert runs[0].info.run_name == tmp_path.name
    assert runs[0].data.params["task.kind"] == "sdpo"
    assert len(runs[0].data.params) == len(CONFIG)
    history = client.get_metric_history(runs[0].info.run_id, "train/rewards/margins")
    assert [(entry.step, entry.value) for entry in history] == [(1, 0.5), (2, 1.0), (3, 0.5), (4, 1.0)]
    assert said == []


@pytest.mark.parametrize(
    ("keys", "module"),
    [({"tensorboard": True}, "tensorboardX"), ({"wandb": "offline"}, "wandb"), ({"mlflow": "online"}, "mlflow")],
)
def test_a_package_that_is_not_installed_is_one_line_with_the_way_out(
    keys: dict[str, Any], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # Python's own mark for a module that is not there
    key = next(iter(keys))
    with pytest.raises(UserError, match=rf"track\.{key} needs the package {module}.*pip install {module}"):
        check_trackers(TrackConfig(**keys))
    check_trackers(TrackConfig())


def test_a_server_that_does_not_answer_ends_the_first_start_and_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said: list[str] = []
    with pytest.raises(UserError, match=r"track\.mlflow cannot be started: \w+.*mend it or leave the key out"):
        tracked(tmp_path, said, mlflow="online")
    assert not (tmp_path / "trackers.json").exists()
    tracked(tmp_path, said, tensorboard=True)
    tracked(tmp_path, said, tensorboard=True, mlflow="online")
    assert [line.partition(":")[0] for line in said] == ["WARNING"]
    assert "goes on without it" in said[0]


class Broken:
    """A tracker whose service goes away after some rows."""

    def __init__(self, good: int) -> None:
        self.good, self.rows = good, 0

    def log(self, row: Any) -> None:
        if self.rows == self.good:
            raise ConnectionError("the service\nis gone")
        self.rows += 1

    def close(self) -> None:
        raise AssertionError("it was left out before")


class Kept:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def log(self, row: Any) -> None:
        self.steps.append(row["step"])

    def close(self) -> None:
        self.closed = True


def test_a_tracker_that_fails_is_left_out_with_a_line_and_the_others_go_on() -> None:
    said: list[str] = []
    broken, kept = Broken(1), Kept()
    trackers = Trackers([broken, kept], said.append)
    for row in [*ROWS, {**ROWS[0], "step": 3}]:
        trackers.log(row)
    trackers.close()
    assert (broken.rows, kept.steps, kept.closed) == (1, [1, 2, 3], True)
    assert said == ["WARNING: Broken failed and is left out from here on: ConnectionError: the service is gone"]


def test_nothing_is_written_where_nothing_is_tracked(tmp_path: Path) -> None:
    tracked(tmp_path, [])
    assert os.listdir(tmp_path) == []
