"""`rec-dist status` on a copy in an object store: the run's own files are read, and keys that are no paths touch nothing."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import BUCKET, S3Server, running

from rec_dist.cli import main
from rec_dist.storage.location import Location


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with running() as shared:
        yield shared


@pytest.fixture
def copy(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix that holds the copy of a run after 6 of 10 steps; temporary folders are made below tmp_path."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    prefix = tmp_path.name
    rows = [{"event": "step", "step": step, "step_seconds": 5.0} for step in range(1, 7)]
    files = {
        "config.yaml": "{}",
        "config.json": "{}",
        "owner.json": "{}",
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "progress.json": json.dumps({"phase": "train", "done": 6, "total": 10}),
        "checkpoints/step-00000004/COMMITTED": "{}",
        "checkpoints/step-00000006/weights": "{}",
    }
    for name, text in files.items():
        server.write(f"{prefix}/{name}", text.encode())
    return prefix


def said(server: S3Server, prefix: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["status", server.uri(prefix)]) == 0
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_a_copy_is_read_without_its_checkpoints(server: S3Server, copy: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(server, copy, capsys)
    assert found["run"] == f"s3://{BUCKET}/{copy}"
    assert found["step"] == "6 of 10 (60 %)"
    assert found["checkpoint"] == "after step 4", "a checkpoint without its commit marker is none"
    assert server.num_fetches(f"{copy}/checkpoints/step-00000004/COMMITTED") == 0


@pytest.mark.parametrize(
    "key",
    [
        "..%2F..%2FEVIL",
        "%2E%2E/%2E%2E/EVIL",
        "../../../EVIL",
        "/EVIL",
        "//tmp/EVIL",
        ".",
        "a/.",
        "checkpoints/../../../EVIL/COMMITTED",
        "checkpoints/step-00000009/../../../EVIL/COMMITTED",
        "checkpoints/step-00000009/a/COMMITTED",
        "checkpoints/" + "n" * 300 + "/COMMITTED",
        "n" * 300,
        "checkpoints",
        "config.yaml/COMMITTED",
        "model",
    ],
)
def test_a_key_that_is_no_file_of_a_run_changes_nothing(
    key: str, server: S3Server, copy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = said(server, copy, capsys)
    server.write_key(f"{copy}/{key}", b"evil")
    before = sorted(tmp_path.rglob("*"))
    found = said(server, copy, capsys)
    assert {**found, "state": ""} == {**whole, "state": ""}
    assert sorted(tmp_path.rglob("*")) == before
    for name in Location(server.uri(copy)).tree():
        target = (tmp_path / "a" / name).resolve()
        assert target.is_relative_to(tmp_path / "a") and target != tmp_path / "a"


@pytest.mark.parametrize("text", ["{}", '{"step": "x"}'])
def test_a_damaged_end_is_one_line(text: str, server: S3Server, copy: str, capsys: pytest.CaptureFixture[str]) -> None:
    server.write(f"{copy}/finished.json", text.encode())
    assert main(["status", server.uri(copy)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "finished.json" in line and "remove that file" in line


def test_a_damaged_row_is_left_out(server: S3Server, copy: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = said(server, copy, capsys)
    rows = server.read(f"{copy}/metrics.jsonl")
    server.write(f"{copy}/metrics.jsonl", rows + b'{"event": "step"}\n{"event": "failed"}\n')
    assert {**said(server, copy, capsys), "state": ""} == {**whole, "state": ""}


def test_a_bucket_that_does_not_exist_is_not_a_place_without_a_run(server: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", server.uri("nothing")]) == 2
    assert capsys.readouterr().err.startswith(f"error: s3://{BUCKET}/nothing holds no run; give the checkpoint.remote of a run")
    assert main(["status", server.uri("x").replace(BUCKET, "no-such-bucket")]) == 2
    assert capsys.readouterr().err.startswith("error: s3://no-such-bucket/x cannot be read: its bucket does not exist")
