"""checkpoint.remote: a run whose machine is lost continues from the copy, on S3 and in a folder, to the same end."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from s3_server import BUCKET, CREDENTIALS, S3Server, running
from safetensors.numpy import load_file
from worker_processes import Child, start

from rec_dist.cli import main

Make = Callable[..., dict[str, Any]]
NUM_STEPS = 120
STEPS = {"train.max_steps": NUM_STEPS, "train.epochs": 60, "checkpoint.every_steps": 10}


@pytest.fixture
def server() -> Iterator[S3Server]:
    with running() as own:
        yield own


@pytest.fixture
def begin(tmp_path: Path, tiny_config: Make) -> Callable[..., Child]:
    """Starts `rec-dist train`: NUM_STEPS steps in the run directory `name`, with a copy at `mirror`."""

    def begin(name: str, remote: object, *changes: Any) -> Child:
        path = tmp_path / f"{name}.yaml"
        value = tiny_config(tmp_path / name, "task.kind=sdpo", STEPS, {"checkpoint.remote": remote and str(remote)}, *changes)
        path.write_text(yaml.safe_dump(value), encoding="utf-8")
        return start(main, ["train", str(path)], folder=tmp_path / f"{name}-out", environment=CREDENTIALS)

    return begin


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [row["step"] for row in rows if row["event"] == "step"]


def weights(run: Path) -> bytes:
    return (run / "model" / "adapter_model.safetensors").read_bytes()


def wait_for(what: Callable[[], Any], child: Child) -> None:
    end = time.monotonic() + 150
    while time.monotonic() < end and not what():
        assert child.process.is_alive(), child.err
        time.sleep(0.02)
    assert what()


@pytest.fixture
def whole(begin: Callable[..., Child], tmp_path: Path) -> Path:
    """The undisturbed run."""
    assert begin("whole", None).wait() == 0
    return tmp_path / "whole"


def objects(server: S3Server, prefix: str) -> dict[str, bytes]:
    from pyarrow import fs

    found = server.files.get_file_info(fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True, allow_not_found=True))
    names = [entry.path.removeprefix(f"{BUCKET}/") for entry in found if entry.type == fs.FileType.File]
    return {name.removeprefix(f"{prefix}/"): server.read(name) for name in names}


@pytest.mark.slow
@pytest.mark.quick
def test_a_run_whose_machine_is_lost_goes_on_from_the_copy(
    server: S3Server, begin: Callable[..., Child], whole: Path, tmp_path: Path
) -> None:
    place, first, second = server.uri("runs/x"), tmp_path / "first", tmp_path / "second"
    child = begin("first", place)
    wait_for(lambda: any(name.endswith("COMMITTED") for name in objects(server, "runs/x")), child)
    child.kill()
    saved = [name for name in objects(server, "runs/x") if name.endswith("COMMITTED")]
    assert saved
    done = steps(first)[-1]
    assert done < NUM_STEPS
    shutil.rmtree(first)  # the machine with everything on it

    code, shown = _status(place, tmp_path)
    assert code == 0 and "not finished when it was copied" in shown and "checkpoint  after step" in shown

    child = begin("second", place)
    assert child.wait() == 0, child.err
    assert "checkpoint.remote: fetching the run from s3://rec-dist-tests/runs/x" in child.err
    assert "resumed after step" in child.err
    assert steps(second) == list(range(1, NUM_STEPS + 1))
    assert weights(second) == weights(whole)
    there = objects(server, "runs/x")
    mine = {str(path.relative_to(second)): path.read_bytes() for path in second.rglob("*") if path.is_file()}
    private = {name for name in mine if name.startswith((".", "attempt/", "stacks/"))}
    assert there.keys() - {"owner.json"} == mine.keys() - private
    assert [name for name in mine.keys() - private if there[name] != mine[name]] == []
    code, shown = _status(place, tmp_path)
    assert code == 0 and "finished" in shown and f"{NUM_STEPS} of {NUM_STEPS}" in shown

    # a third place: the model is there, and nothing is left to train
    child = begin("third", place)
    assert child.wait() == 0, child.err
    assert f"is finished ({NUM_STEPS} steps); nothing to do" in child.err
    assert weights(tmp_path / "third") == weights(whole)
    shutil.rmtree(tmp_path / "third")
    words = ["submit", str(tmp_path / "third.yaml"), "--to", "slurm"]
    child = start(main, words, folder=tmp_path / "submit-out", environment=CREDENTIALS)
    assert (child.wait(), child.err) == (0, "checkpoint.remote holds the finished run; nothing to do\n")
    child = start(main, [*words, "optimizer.lr=0.1"], folder=tmp_path / "submit-out", environment=CREDENTIALS)
    assert child.wait() == 2
    assert "holds a run of another configuration (different: optimizer.lr)" in child.err


def _status(place: str, folder: Path) -> tuple[int, str]:
    child = start(main, ["status", place], folder=folder / "status-out", environment=CREDENTIALS)
    return child.wait(), child.out + child.err


@pytest.mark.slow
def test_two_run_directories_do_not_mix_in_one_copy(begin: Callable[..., Child], whole: Path, tmp_path: Path) -> None:
    place = tmp_path / "copies" / "x"
    child = begin("first", place)
    wait_for(lambda: list(place.glob("checkpoints/step-*/COMMITTED")), child)
    other = begin("second", place)
    assert child.wait() == 2, child.err
    line = next(line for line in child.err.splitlines() if line.startswith("error:"))
    assert line.startswith(f"error: checkpoint.remote ({place}) was taken over by the run in {tmp_path / 'second'} on ")
    assert other.wait() == 0, other.err
    assert steps(tmp_path / "second") == list(range(1, NUM_STEPS + 1))
    assert weights(tmp_path / "second") == weights(whole)
    assert (place / "model" / "adapter_model.safetensors").read_bytes() == weights(whole)


@pytest.mark.slow
def test_a_store_that_goes_does_not_cost_the_run(server: S3Server, begin: Callable[..., Child], tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "copy"
    child = begin("run", server.uri("runs/x"))
    wait_for(lambda: steps(run), child)
    server.kill()
    assert child.wait() == 1
    failed = [line for line in child.err.splitlines() if line.startswith("failed:")]
    assert len(failed) == 1 and "Traceback" not in child.err
    assert failed[0].startswith("failed: checkpoint.remote: s3://rec-dist-tests/runs/x/")
    assert f"the run itself is whole in {run}: run the same command again" in failed[0]
    assert steps(run) == list(range(1, NUM_STEPS + 1))
    assert (run / "finished.json").is_file()

    child = begin("run", place)  # another place: everything is copied there, and nothing is trained
    assert child.wait() == 0, child.err
    assert "nothing to do" in child.err
    assert load_file(place / "model" / "adapter_model.safetensors").keys()
    assert (place / "finished.json").read_bytes() == (run / "finished.json").read_bytes()


def test_a_copy_that_is_no_copy_of_this_run_is_refused_and_nothing_is_left(begin: Callable[..., Child], tmp_path: Path) -> None:
    place = tmp_path / "copy"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")

    def refused(*changes: Any, remote: object = place) -> str:
        child = begin("run", remote, *changes)
        assert child.wait() == 2, child.err
        assert not (tmp_path / "run").exists()
        return child.err.splitlines()[-1]

    assert refused() == f"error: checkpoint.remote ({place}) holds no run and is not empty (thesis.txt); choose another"
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]
    for nested in (tmp_path / "run" / "copy", tmp_path):
        assert "one inside the other" in refused(remote=nested)
    assert "checkpoint.remote is empty" in refused(remote=" ")
    assert refused(remote="ftp://host/x").startswith("error: checkpoint.remote (ftp://host/x) cannot be opened")
    (place / "thesis.txt").unlink()
    assert begin("good", place, {"train.max_steps": 2}).wait() == 0
    assert "(different: train.max_steps" in refused({"train.max_steps": 3})
    (place / "config.json").write_text("{")
    assert "is damaged" in refused({"train.max_steps": 2})
