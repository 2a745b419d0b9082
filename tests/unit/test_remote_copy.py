"""checkpoint.remote with folders, without training: neither side loses a file because the other lost or damaged some."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rec_dist.checkpoint import files as checkpoint
from rec_dist.checkpoint.remote_copy import RemoteCopy, TakenOverError
from rec_dist.checkpoint.remote_files import wanted
from rec_dist.errors import UserError
from rec_dist.runtime.messages import messages_to
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.checksums import describe, write_checksums
from rec_dist.storage.location import Stored

LINES: list[str] = []


def config(run: RunDirectory, lr: float = 0.1) -> dict[str, Any]:
    return {"train": {"run_dir": str(run.path)}, "optimizer": {"lr": lr}}


def save(run: RunDirectory, step: int) -> Path:
    """Writes a checkpoint of one small file, as the manager does."""
    folder = checkpoint.folder_of(run.checkpoints, step)
    partial = folder.with_name(folder.name + ".tmp")
    partial.mkdir(parents=True)
    state = partial / "state.safetensors"
    state.write_bytes(f"the state after step {step}".encode())
    manifest = checkpoint.Manifest(
        step=step,
        world_size=1,
        zero_stage=3,
        base=None,
        config="c",
        sampler={},
        valid_loss=None,
        versions={},
        files=[describe(state)],
    )
    checkpoint.commit(partial, folder, manifest)
    return folder


def finish(run: RunDirectory, step: int) -> None:
    run.model.mkdir()
    (run.model / "adapter_model.safetensors").write_bytes(b"weights")
    write_checksums(run.model)
    run.finish({"step": step})


def attempt(run: RunDirectory, place: Path, *work: Callable[[], object]) -> None:
    """Does what `train` does with the remote copy before and after its work."""
    value = config(run)
    remote = RemoteCopy(run, str(place))
    with messages_to(LINES.append), run.claimed(value, "{}\n"):
        remote.fetch(value)
        with remote.kept_up():
            for each in work:
                each()


def steps(folder: Path) -> list[int]:
    return [step for step in checkpoint.committed(folder) if not checkpoint.verify(checkpoint.folder_of(folder, step))]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    LINES.clear()
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def test_what_keep_removed_here_goes_there_and_nothing_else(run: RunDirectory, place: Path) -> None:
    attempt(run, place, lambda: save(run, 10), lambda: save(run, 20))
    (place / "notes by hand.txt").write_text("mine")
    (place / "checkpoints" / "notes.txt").write_text("mine too")
    shutil.rmtree(run.checkpoints / "step-00000010")
    attempt(run, place, lambda: save(run, 30))
    assert steps(place / "checkpoints") == [20, 30]
    assert not (place / "checkpoints" / "step-00000010").exists(), "no empty folder stays"
    assert (place / "notes by hand.txt").is_file() and (place / "checkpoints" / "notes.txt").is_file()


@pytest.mark.parametrize("loss", ["checkpoints", "one byte of each", "an old backup"])
def test_what_was_lost_here_comes_back_and_is_not_lost_there(run: RunDirectory, place: Path, loss: str) -> None:
    attempt(run, place, lambda: save(run, 10))
    backup = run.path.with_name("backup")
    shutil.copytree(run.path, backup)
    attempt(run, place, lambda: save(run, 20), lambda: save(run, 30))
    if loss == "checkpoints":
        shutil.rmtree(run.checkpoints)
    elif loss == "one byte of each":
        for state in run.checkpoints.glob("*/state.safetensors"):
            state.write_bytes(b"x" + state.read_bytes()[1:])
    else:
        shutil.rmtree(run.path)
        backup.rename(run.path)
    attempt(run, place)
    assert steps(run.checkpoints)[-1] == 30
    assert steps(place / "checkpoints")[-1] == 30


def test_a_model_that_was_lost_here_comes_back(run: RunDirectory, place: Path) -> None:
    attempt(run, place, lambda: save(run, 10), lambda: finish(run, 10))
    shutil.rmtree(run.model)
    attempt(run, place)
    assert (run.model / "adapter_model.safetensors").read_bytes() == b"weights"


def test_what_was_lost_there_is_copied_again(run: RunDirectory, place: Path) -> None:
    attempt(run, place, lambda: save(run, 10), lambda: finish(run, 10))
    shutil.rmtree(place / "checkpoints")
    (place / "model" / "adapter_model.safetensors").write_bytes(b"x")
    attempt(run, place)
    assert steps(place / "checkpoints") == [10]
    assert (place / "model" / "adapter_model.safetensors").read_bytes() == b"weights"


def test_a_copy_that_is_removed_meanwhile_is_made_anew(run: RunDirectory, place: Path) -> None:
    attempt(run, place, lambda: save(run, 10), lambda: shutil.rmtree(place), lambda: save(run, 20))
    assert steps(place / "checkpoints") == [10, 20]


def test_damaged_checkpoints_of_the_copy_replace_none_here(run: RunDirectory, place: Path, tmp_path: Path) -> None:
    attempt(run, place, lambda: save(run, 10), lambda: save(run, 20))
    shutil.rmtree(run.checkpoints / "step-00000020")
    for state in place.glob("checkpoints/*/state.safetensors"):
        state.write_bytes(b"x" + state.read_bytes()[1:])
    attempt(run, place)
    assert steps(run.checkpoints) == [10]
    assert any("checkpoint passed over: step-00000020" in line for line in LINES)
    assert not (run.path / ".fetched").exists()


def test_a_finished_copy_with_a_damaged_model_gives_its_checkpoints(run: RunDirectory, place: Path, tmp_path: Path) -> None:
    attempt(run, place, lambda: save(run, 10), lambda: finish(run, 10))
    (place / "model" / "adapter_model.safetensors").write_bytes(b"weightz")
    other = RunDirectory(tmp_path / "other")
    with pytest.raises(InterruptedError):
        attempt(other, place, lambda: (_ for _ in ()).throw(InterruptedError()))
    assert steps(other.checkpoints) == [10]
    assert other.finished() is None and not other.model.exists(), "the model is made again"
    assert any("adapter_model.safetensors has changed since it was written" in line for line in LINES)


@pytest.mark.parametrize("what", ["a folder of mine", "another run"])
def test_a_folder_that_is_not_this_runs_is_refused_before_anything_is_fetched(
    run: RunDirectory, place: Path, tmp_path: Path, what: str
) -> None:
    attempt(run, place, lambda: save(run, 10), lambda: finish(run, 10))
    other = RunDirectory(tmp_path / "other")
    (other.path / "model").mkdir(parents=True)
    (other.path / "model" / "thesis.txt").write_text("years of work")
    if what == "another run":
        (other.path / "config.json").write_text(json.dumps(config(other, lr=0.2)))
    before = {path: path.read_bytes() for path in other.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"train.run_dir .*(holds no run|another configuration)"):
        attempt(other, place)
    assert {path: path.read_bytes() for path in other.path.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_a_second_owner_stops_the_first_before_its_next_file(run: RunDirectory, place: Path, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "other")

    def take_over() -> None:
        attempt(other, place, lambda: save(other, 20))

    with pytest.raises(TakenOverError, match=rf"was taken over by the run in {other.path} on .*; let one of them run"):
        attempt(run, place, lambda: save(run, 10), take_over, lambda: save(run, 30))
    assert 30 not in steps(place / "checkpoints")


def test_checkpoints_on_another_disk_are_copied_and_fetched(run: RunDirectory, place: Path, tmp_path: Path) -> None:
    big = tmp_path / "big disk"
    big.mkdir()
    run.path.mkdir()
    with run.claimed(config(run), "{}\n"):
        pass
    run.checkpoints.symlink_to(big)
    attempt(run, place, lambda: save(run, 10))
    assert steps(place / "checkpoints") == [10]
    shutil.rmtree(big / "step-00000010")
    attempt(run, place)
    assert steps(big) == [10]


def test_two_places_that_differ_in_their_options_are_two(run: RunDirectory, tmp_path: Path) -> None:
    first, second = (RemoteCopy(run, f"s3://bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http") for port in (1, 2))
    assert first._about["place"] != second._about["place"]


@pytest.mark.parametrize("text", ["[[1, 2]]", "[" * 200_000, "{", '"x"'])
@pytest.mark.parametrize("name", ["config.json", "owner.json"])
def test_a_damaged_copy_is_one_line(run: RunDirectory, place: Path, tmp_path: Path, name: str, text: str) -> None:
    attempt(run, place, lambda: save(run, 10))
    (place / name).write_text(text)
    (run.path / ".remote.json").write_text(text)
    if name == "owner.json":  # the next attempt writes it again
        attempt(run, place)
    else:
        with pytest.raises(UserError, match=r"config.json is damaged; choose another, or remove what is there"):
            attempt(run, place)


def test_only_paths_below_are_taken_and_no_file_where_a_folder_is() -> None:
    good = ["metrics.jsonl", "model/a b.json", "checkpoints/step-1/COMMITTED", "checkpoints/step-1/state", "tb/ü"]
    bad = ["../x", "a/../../x", "a//tmp/x", "/x", ".", "model", "x" * 300, "a\0b", "owner.json", "attempt/rank-0", "tb/.hidden"]
    bad += ["checkpoints/step-²/COMMITTED", "checkpoints/step-2/state", "checkpoints/step-3.tmp/COMMITTED"]
    assert sorted(wanted({name: Stored(1, 0.0) for name in good + bad})) == sorted(good)


def test_a_thread_copies_a_checkpoint_while_work_goes_on(run: RunDirectory, place: Path) -> None:
    def wait() -> None:
        end = time.monotonic() + 30
        while not steps(place / "checkpoints") and time.monotonic() < end:
            time.sleep(0.05)
        assert steps(place / "checkpoints") == [10]

    attempt(run, place, lambda: save(run, 10), wait)
