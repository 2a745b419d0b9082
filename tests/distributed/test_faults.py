"""The fault matrix: every kind of fault, in every phase, on either of two real Ray workers with DeepSpeed ZeRO-3.

Each run must end with the parameters of an undisturbed one, bit for bit, or with the stop that docs/reliability.md states. A
case takes about 35 s on two idle cores. `make test-faults` runs all cases and renders the table; `make test` runs those
marked quick, and with a killed Ray worker in test_ray.py.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from real_runs import CHANGES, assert_same, came_to, command, descendants, finish, plugged, undisturbed, wait_until, write_config

pytestmark = [pytest.mark.slow, pytest.mark.faults]

KINDS = ("exception", "SIGKILL", "SIGSTOP", "SIGTERM")
PHASES = ("in a step", "before commit", "after commit", "while loading", "in the loader")
CALLS = {"in a step": 5, "before commit": 2, "after commit": 2, "while loading": 1, "in the loader": 5}


CASES = [(kind, phase, rank) for phase in PHASES for kind in KINDS for rank in (0, 1)]


@pytest.mark.parametrize(
    ("kind", "phase", "rank"), [pytest.param(*case, id=f"{case[0]} {case[1]} rank {case[2]}") for case in CASES]
)
def test_a_worker_fails(trainer: Any, tmp_path: Path, record: dict[str, Any], kind: str, phase: str, rank: int) -> None:
    record.update(fault=kind, where=phase, rank=rank)
    run_dir, marker = tmp_path / "run", tmp_path / "struck"
    limit = ["cluster.hang_seconds=60"] if kind == "SIGSTOP" else []  # more than the imports take on a busy machine
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *CHANGES, *limit))
    if phase == "while loading":  # there must be a checkpoint to load
        trainer.train(run_dir, *CHANGES, workers=2, stop_after=4)
    fault = {"kind": kind, "phase": phase, "rank": rank, "call": CALLS[phase], "marker": str(marker)}
    code, err = finish(command("train", config, **plugged(fault)))
    assert marker.exists(), f"the fault never came: {err}"
    assert code == 0, err
    assert "Traceback" not in err
    run = type(undisturbed(trainer))(run_dir)
    restarts = [row for row in run.rows if row["event"] == "restart"]
    assert len(restarts) == 1, err
    if kind == "SIGSTOP":
        assert "no worker made progress for 6" in restarts[0]["reason"]
        stopped, other = ((run_dir / "stacks" / f"rank-{number}.txt").read_text(encoding="utf-8") for number in (rank, 1 - rank))
        # After SIGCONT it runs while its stack is written, and if the machine is busy past the line where it was stopped.
        assert "stopped by a signal" in stopped and "in train_worker" in stopped
        assert "stopped by a signal" not in other and "most recent call first" in other
    assert_same(run, undisturbed(trainer))
    record.update(restarts=len(restarts), outcome="same parameters, bit for bit")


def test_a_collective_that_never_ends(trainer: Any, tmp_path: Path, record: dict[str, Any]) -> None:
    """Rank 0 waits for a message that nobody sends, rank 1 in the collective of the step: both live, and neither makes progress."""
    record.update(fault="hang", where="a collective that one rank never joins")
    run_dir, marker = tmp_path / "run", tmp_path / "struck"
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *CHANGES, "cluster.hang_seconds=60"))
    fault = {"kind": "receive", "phase": "in a step", "rank": 0, "call": 5, "marker": str(marker)}
    code, err = finish(command("train", config, **plugged(fault)))
    assert marker.exists() and code == 0, err
    run = type(undisturbed(trainer))(run_dir)
    restarts = [row for row in run.rows if row["event"] == "restart"]
    assert len(restarts) == 1 and "no worker made progress for 6" in restarts[0]["reason"], err
    stacks = [(run_dir / "stacks" / f"rank-{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert all("most recent call first" in stack and "stopped by a signal" not in stack for stack in stacks)
    assert "in recv" in stacks[0] and "in recv" not in stacks[1] and "distributed_c10d" in stacks[1]
    assert_same(run, undisturbed(trainer))
    record.update(restarts=1, outcome="same parameters, bit for bit")


def test_workers_that_never_begin(trainer: Any, tmp_path: Path, record: dict[str, Any]) -> None:
    """Their imports hang, as on a file system that is gone: no worker ever gives a sign of life."""
    record.update(fault="hang", where="the workers' imports, before the first sign of life")
    run_dir, stuck = tmp_path / "run", {"kind": "slow", "phase": "importing", "seconds": 3600}
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *CHANGES, "cluster.hang_seconds=40"))
    began = time.monotonic()
    code, err = finish(command("train", config, **plugged(stuck)))
    assert code == 1, err
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and "no worker gave a sign of life for 4" in failed[0] and "cluster.hang_seconds" in failed[0], err
    assert time.monotonic() - began < 300 and "Traceback" not in err
    code, err = finish(command("train", config))
    assert code == 0, err
    assert_same(type(undisturbed(trainer))(run_dir), undisturbed(trainer))
    record.update(outcome="exit 1, one line; run again: same parameters, bit for bit")


def test_the_driver_is_killed(trainer: Any, tmp_path: Path, record: dict[str, Any]) -> None:
    """SIGKILL, and the same command at once, while Ray is still stopping the first one's workers."""
    record.update(fault="SIGKILL", where="the driver")
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *CHANGES))
    process = command("train", config)
    wait_until(came_to(run_dir, 5), process)
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()  # not read to its end: processes that Ray still runs hold the other side
    code, err = finish(command("train", config))
    assert code == 0, err
    run = type(undisturbed(trainer))(run_dir)
    assert [row["event"] for row in run.rows].count("resume") == 1
    assert_same(run, undisturbed(trainer))
    record.update(outcome="run again: same parameters, bit for bit")


def test_the_head_is_killed(trainer: Any, tmp_path: Path, record: dict[str, Any]) -> None:
    """The run says so and ends with 1; the same command continues in a new cluster."""
    record.update(fault="SIGKILL", where="the Ray head")
    run_dir, slow = tmp_path / "run", {"kind": "slow", "phase": "in a step", "seconds": 2.0}
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *CHANGES))
    process = command("train", config, **plugged(slow))
    wait_until(came_to(run_dir, 4), process)
    for child in [*descendants(process, "gcs_server"), *descendants(process, "raylet/raylet")]:
        child.kill()
    killed = time.monotonic()
    code, err = finish(process)
    seconds = time.monotonic() - killed
    assert code == 1, err
    assert seconds < 60, f"{seconds:.0f} s: the documents say a minute"
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and "the Ray head at" in failed[0] and "run the same command again" in failed[0]
    assert "Traceback" not in err
    code, err = finish(command("train", config))
    assert code == 0, err
    assert_same(type(undisturbed(trainer))(run_dir), undisturbed(trainer))
    record.update(outcome=f"exit 1 after {seconds:.0f} s, one line; run again: same parameters, bit for bit")


def damage(folder: Path, how: str) -> None:
    """Damages the largest file of a checkpoint: cuts it in half, as after a lost write, or flips one bit of it."""
    path = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    if how == "torn":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["torn", "bit-flipped"])
def test_the_newest_checkpoint_is_damaged(trainer: Any, tmp_path: Path, record: dict[str, Any], how: str) -> None:
    record.update(fault=how, where="the newest checkpoint")
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *CHANGES))
    trainer.train(run_dir, *CHANGES, workers=2, stop_after=7)
    damage(run_dir / "checkpoints" / "step-00000007", how)
    code, err = finish(command("train", config))
    assert code == 0, err
    assert "WARNING: checkpoint passed over: step-00000007" in err
    run = type(undisturbed(trainer))(run_dir)
    assert [row["step"] for row in run.rows if row["event"] == "resume"] == [6]
    assert_same(run, undisturbed(trainer))
    record.update(outcome="the one before is taken: same parameters, bit for bit")


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """Mounts a file system in memory of that size at `folder` inside the block."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this machine does not let root mount: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_disk_is_full(trainer: Any, tmp_path: Path, record: dict[str, Any]) -> None:
    """There is room for the first checkpoint (60 KB) but not for a second beside it."""
    record.update(fault="no space", where="the disk of the checkpoints")
    run_dir = tmp_path / "run"
    trainer.claim(run_dir, CHANGES)
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *CHANGES))
    with mounted(run_dir / "checkpoints", "100k"):
        code, err = finish(command("train", config))
        assert code == 1, err
        failed = [line for line in err.splitlines() if line.startswith("failed: ")]
        assert len(failed) == 1 and "No space left on device" in failed[0] and "free space there" in failed[0]
        assert "Traceback" not in err
        subprocess.run(["mount", "-o", "remount,size=8m", str(run_dir / "checkpoints")], check=True)
        code, err = finish(command("train", config))
        assert code == 0, err
    run = type(undisturbed(trainer))(run_dir)
    assert [row["step"] for row in run.rows if row["event"] == "resume"] == [3]
    assert_same(run, undisturbed(trainer))
    record.update(outcome="exit 1, one line; with room run again: same parameters, bit for bit")


def test_a_stop_that_takes_too_long_is_cut_short(trainer: Any, tmp_path: Path, record: dict[str, Any]) -> None:
    """SIGTERM to the driver while a worker's step takes longer than checkpoint.grace_seconds still gives 75, and soon."""
    record.update(fault="SIGTERM", where="the driver, in a step longer than checkpoint.grace_seconds")
    run_dir, slow = tmp_path / "run", {"kind": "slow", "phase": "in a step", "seconds": 4.0}
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *CHANGES, "checkpoint.grace_seconds=1"))
    process = command("train", config, **plugged(slow))
    wait_until(came_to(run_dir, 4), process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, err = finish(process)
    assert code == 75, err
    assert "stopped without a new checkpoint" in err and "checkpoint.grace_seconds" in err
    assert time.monotonic() - began < 60
    code, err = finish(command("train", config))
    assert code == 0, err
    run = type(undisturbed(trainer))(run_dir)
    assert [row["step"] for row in run.rows if row["event"] == "resume"] == [3]
    assert_same(run, undisturbed(trainer))
    record.update(outcome="exit 75 without a new checkpoint; run again: same parameters, bit for bit")


_LOCAL = (*CHANGES, "cluster.launcher=local", "cluster.num_workers=1", "cluster.zero_stage=0")


@pytest.mark.parametrize("stopped", [False, True], ids=["hang", "late stop"])
def test_where_the_worker_is_the_driver(trainer: Any, tmp_path: Path, record: dict[str, Any], stopped: bool) -> None:
    """cluster.launcher=local: nobody can restart the run, so a hang ends it with 1, and a stop that comes too late with 75."""
    record.update(fault="late stop" if stopped else "hang", where="a run with cluster.launcher=local")
    run_dir, stuck = tmp_path / "run", {"kind": "slow", "phase": "in a step", "call": 5, "seconds": 600, "driver": True}
    limit = "checkpoint.grace_seconds=1" if stopped else "cluster.hang_seconds=15"
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *_LOCAL, limit))
    process = command("train", config, **plugged(stuck))
    wait_until(came_to(run_dir, 4), process)
    if stopped:
        process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    if stopped:
        assert code == 75 and "stopped without a new checkpoint" in err, err
    else:
        assert code == 1 and "failed: hang: no worker made progress for 1" in err, err
        assert "in call" in (run_dir / "stacks" / "rank-0.txt").read_text(encoding="utf-8")
    assert "Traceback" not in err
    code, err = finish(command("train", config))
    assert code == 0, err
    expected = trainer.once(*_LOCAL)
    run = type(expected)(run_dir)
    assert [row["step"] for row in run.rows if row["event"] == "resume"] == [3]
    assert_same(run, expected)
    record.update(outcome=f"exit {75 if stopped else 1}, one line; run again: same parameters, bit for bit")
