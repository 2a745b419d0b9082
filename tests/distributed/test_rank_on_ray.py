"""`rec-dist rank --launcher ray` on two real Ray workers: the bytes of one machine, also after a kill. About two minutes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finished_runs import finished_run, raw_item
from real_runs import descendants
from slow_ranking import RANK_SLOWLY

from rec_dist.ranking.unfinished import parts_folder

pytestmark = pytest.mark.slow
_SECONDS = 300.0


def start(*words: object, slowed: float = 0.0) -> subprocess.Popen[str]:
    """`rec-dist rank WORDS`. slowed: seconds of each block."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK_SLOWLY, str(slowed), "rank", *map(str, words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    _, err = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, err
    return err


def test_the_same_bytes_with_a_killed_worker(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one")
    candidates = tmp_path / "candidates.jsonl"
    lines = [f'{{"user_id": "{user:03d}", "candidates": ["{raw_item(user % 11)}", "01", "07"]}}' for user in range(0, 24, 3)]
    candidates.write_text("\n".join(lines), encoding="utf-8")
    on_ray = ("--launcher", "ray", "cluster.num_workers=2", "cluster.cpus_per_worker=1", "cluster.use_gpu=false")
    for name, words in (("all.parquet", ()), ("listed.jsonl", ("--candidates", candidates))):
        here, there = tmp_path / "here" / name, tmp_path / "there" / name
        ended(start(run, "--top-k", 3, *words, "--out", here))
        err = ended(start(run, "--top-k", 3, *words, *on_ray, "--out", there))
        assert there.read_bytes() == here.read_bytes(), err

    output = tmp_path / "killed" / "all.parquet"
    process = start(run, "--top-k", 3, *on_ray, "--out", output, slowed=4.0)
    deadline = time.monotonic() + _SECONDS
    while len(workers := descendants(process, "ray::MapWorker")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(5.0)  # it has begun
    workers[0].kill()
    ended(process)
    assert output.read_bytes() == (tmp_path / "here" / "all.parquet").read_bytes()
    assert not parts_folder(output).exists()


def test_a_killed_command_continues_on_ray(tmp_path: Path) -> None:
    """What was ranked before the kill, on Ray or on one machine, is not ranked again."""
    run = finished_run(tmp_path / "one")
    on_ray = ("--launcher", "ray", "cluster.num_workers=2", "cluster.cpus_per_worker=1", "cluster.use_gpu=false")
    whole, output = tmp_path / "whole.parquet", tmp_path / "out" / "all.parquet"
    ended(start(run, "--top-k", 3, "--out", whole))
    process = start(run, "--top-k", 3, *on_ray, "--out", output, slowed=4.0)
    deadline = time.monotonic() + _SECONDS
    while not any(parts_folder(output).glob("*.arrow")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate()
    ranked = max(int(part.stem.split("-")[1]) for part in parts_folder(output).glob("*.arrow"))
    assert ranked < 24 and not output.exists()
    err = ended(start(run, "--top-k", 3, *on_ray, "--out", output))
    assert f"{ranked} of 24 users are ranked already" in err
    assert output.read_bytes() == whole.read_bytes()
    assert not parts_folder(output).exists()
