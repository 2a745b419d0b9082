"""A disk that fills up, turns read-only or closes under a run gives one line, the last good checkpoint, exit code 1 or a warning.

Nothing hangs. The faults are the system's own: small file systems in memory (which only root may mount), and a limit on the
size of files.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from worker_processes import WorkerFailedError, run_command

pytestmark = pytest.mark.slow  # minutes on a busy machine
_RUN = (
    "train.max_steps=6",
    "task.kind=sft",
    "train.global_batch_size=4",
    "train.max_tokens_per_micro_batch=200",
    "checkpoint.every_steps=2",
)
_ADAPTER = (*_RUN, "cluster.zero_stage=3")
_FULL = (*_ADAPTER, "adapter.kind=none", "optimizer.lr=1e-3")  # 0.4 MB a checkpoint
Mount = Callable[..., None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """mount(folder, "size=1m") mounts a file system in memory there; "remount,..." changes it. All are unmounted at the end."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    mounted: list[Path] = []

    def put(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False)
        if done.returncode != 0 and not mounted:
            pytest.skip(f"this machine does not let root mount: {done.stderr.decode().strip()}")
        assert done.returncode == 0, done.stderr
        if "remount" not in options:
            mounted.append(folder)

    yield put
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def folders(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def failures(run: Any) -> list[int]:
    return [row["step"] for row in run.rows if row["event"] == "checkpoint_failed"]


def same_weights(run: Any, expected: Any) -> bool:
    import torch

    return all(torch.equal(run.weights[name], value) for name, value in expected.weights.items())


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_stops_the_run_with_the_last_good_checkpoint(trainer: Any, mount: Mount, asynchronous: str) -> None:
    """Two of three checkpoints fit: both ranks stop with the same line. With more room the run resumes bit for bit."""
    run_dir = trainer.new_dir()
    changes = (*_FULL, f"checkpoint.asynchronous={asynchronous}")
    trainer.claim(run_dir, changes)
    mount(run_dir / "checkpoints", "size=1m")
    with pytest.raises(WorkerFailedError, match="No space left on device") as caught:
        trainer.train(run_dir, *changes, workers=2)
    assert caught.value.kind == "DiskError"
    assert "the checkpoint of step 6 could not be written" in str(caught.value)
    assert "the last good one is step-00000004" in str(caught.value)
    assert folders(run_dir) == {"step-00000002", "step-00000004"}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if row["event"] == "checkpoint_failed"] == [6]
    assert (run_dir / "log.txt").read_text(encoding="utf-8").count("No space left on device") == 1
    mount(run_dir / "checkpoints", "remount,size=8m")
    run = trainer.train(run_dir, *changes, workers=2)
    assert [row["step"] for row in run.rows if row["event"] == "resume"] == [4]
    expected = trainer.once(*_FULL, workers=2)
    assert run.steps == expected.steps
    assert same_weights(run, expected)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_may_be_a_warning(trainer: Any, mount: Mount, asynchronous: str) -> None:
    run_dir = trainer.new_dir()
    changes = (*_FULL, f"checkpoint.asynchronous={asynchronous}", "checkpoint.on_error=continue")
    trainer.claim(run_dir, changes)
    mount(run_dir / "checkpoints", "size=500k")
    run = trainer.train(run_dir, *changes, workers=2)
    assert failures(run) == [4, 6]
    assert run.log.count("No space left on device") == 2
    assert folders(run_dir) == {"step-00000002"}
    expected = trainer.once(*_FULL, workers=2)
    assert run.steps == expected.steps
    assert same_weights(run, expected)


def limited_worker(world: Any, job: Any) -> Any:
    """train_worker in which the system keeps rank 1 alone from writing files above 2 KB."""
    import resource

    from rec_dist.training.worker import train_worker

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        return many_files_worker(world, job) if world.size > 1 else train_worker(world, job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def many_files_worker(world: Any, job: Any) -> Any:
    """train_worker that treats its states as large, so that both ranks write."""
    from rec_dist.checkpoint import state_files
    from rec_dist.training.worker import train_worker

    state_files.MAX_FILE_BYTES = 20_000
    return train_worker(world, job)


@pytest.mark.parametrize("asynchronous", [pytest.param("false", marks=pytest.mark.quick), "true"])
def test_a_fault_on_one_rank_is_known_to_all(trainer: Any, asynchronous: str) -> None:
    run_dir = trainer.new_dir()
    changes = (*_FULL, f"checkpoint.asynchronous={asynchronous}")
    with pytest.raises(WorkerFailedError, match="File too large") as caught:
        trainer.train(run_dir, *changes, workers=2, worker=limited_worker)
    assert caught.value.kind == "DiskError"
    assert "there is no earlier one" in str(caught.value)
    assert folders(run_dir) == set()
    results = sorted(run_dir.with_name(run_dir.name + "-workers").glob("*/result.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    assert [value["raised"] for value in found] == ["DiskError"] * 2
    run = trainer.train(run_dir, *changes, workers=2, worker=many_files_worker)
    assert same_weights(run, trainer.once(*_FULL, workers=2))


def test_a_read_only_disk_is_named(trainer: Any, mount: Mount) -> None:
    run_dir = trainer.new_dir()
    trainer.claim(run_dir, _ADAPTER)
    mount(run_dir / "checkpoints", "size=1m,ro")
    with pytest.raises(WorkerFailedError, match="Read-only file system; mount that disk writable") as caught:
        trainer.train(run_dir, *_ADAPTER, workers=2)
    assert caught.value.kind == "DiskError"


@pytest.mark.quick
def test_written_in_the_background_is_the_same_bytes(trainer: Any) -> None:
    """A checkpoint a step, so that each waits for the one before. A .tmp of a killed attempt is removed."""
    hashes = []
    for asynchronous in ("false", "true"):
        run_dir = trainer.new_dir()
        changes = (*_FULL, "checkpoint.every_steps=1", "checkpoint.keep=9", f"checkpoint.asynchronous={asynchronous}")
        left = run_dir / "checkpoints" / "step-00000009.tmp"
        trainer.claim(run_dir, changes)
        left.mkdir(parents=True)
        run = trainer.train(run_dir, *changes, workers=2, worker=many_files_worker)
        assert folders(run_dir) == {f"step-{step:08d}" for step in range(1, 7)}
        assert [row["step"] for row in run.rows if row["event"] == "checkpoint"] == [1, 2, 3, 4, 5, 6]
        manifests = [json.loads((folder / "manifest.json").read_text()) for folder in sorted(left.parent.iterdir())]
        hashes.append([manifest["files"] for manifest in manifests])
        assert len(hashes[-1][0]) > 4
        assert {manifest["sampler"]["epoch"] for manifest in manifests} == {0}
        assert [manifest["sampler"]["step"] for manifest in manifests] == [1, 2, 3, 4, 5, 6]
        assert all(manifest["versions"]["torch"] and manifest["config"] for manifest in manifests)
    assert hashes[0] == hashes[1]


def test_a_background_write_is_waited_for_at_a_stop(trainer: Any) -> None:
    run_dir = trainer.new_dir()
    changes = (*_FULL, "checkpoint.asynchronous=true", "checkpoint.every_steps=100")
    trainer.train(run_dir, *changes, workers=2, stop_after=3)
    assert folders(run_dir) == {"step-00000003"}
    run = trainer.train(run_dir, *changes, workers=2)
    assert run.steps == trainer.once(*_FULL, workers=2).steps


def test_the_memory_of_a_background_write_is_asked_for_first(trainer: Any) -> None:
    with pytest.raises(WorkerFailedError, match=r"checkpoint\.asynchronous=true needs \d+\.\d GB of the memory") as caught:
        trainer.train(trainer.new_dir(), *_FULL, "checkpoint.asynchronous=true", workers=2, worker=crowded_worker)
    assert caught.value.kind == "UserError"


def crowded_worker(world: Any, job: Any) -> Any:
    """train_worker that asks for the memory of a state of 1e15 bytes."""
    from rec_dist.engine.engine import Engine
    from rec_dist.training.worker import train_worker

    Engine.num_state_bytes = lambda self: 10**15  # type: ignore[method-assign]
    return train_worker(world, job)


@pytest.mark.parametrize("free_kilobytes", [4, 24, 80, 160])
def test_a_disk_that_fills_at_any_moment_of_a_run(trainer: Any, mount: Mount, tmp_path: Path, free_kilobytes: int) -> None:
    """The whole run directory is on a disk with that much room: exit code 1 and one line. With more room the run completes."""
    changes = (*_RUN, "task.kind=sdpo", "cluster.zero_stage=0", "checkpoint.keep=1")
    expected = trainer.once(*changes)
    disk = tmp_path / "disk"
    mount(disk, "size=4m")
    run_dir = disk / "run"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(trainer.config(run_dir, *changes)), encoding="utf-8")
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(free - free_kilobytes * 1024))
    code, child = run_command(tmp_path, "train", config)
    assert code == 1, child.err
    assert "Traceback" not in child.err
    last = child.err.strip().splitlines()[-1]
    assert last.startswith("failed: ")
    assert "No space left on device" in last
    assert "run the same command again" in last
    assert not (run_dir / "model").exists()
    assert not (run_dir / "finished.json").exists()
    filler.unlink()
    code, child = run_command(tmp_path, "train", config)
    assert code == 0, child.err
    run = type(expected)(run_dir)
    assert run.steps == expected.steps
    assert same_weights(run, expected)
    assert not list(run_dir.rglob("*.tmp"))
