"""cluster.zero_stage=auto and cluster.hpz_partition_size in whole runs on two workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

_AUTO, _SMALL = "cluster.zero_stage=auto", "train.max_tokens_per_micro_batch=200"
_SHARDED = ("task.kind=sdpo", "cluster.zero_stage=3", _SMALL)
_COPY = ("cluster.zero_stage=3", "cluster.hpz_partition_size=2")


def stages(run: Any) -> list[tuple[int, int]]:
    """(stage, workers) of each time that workers settled it."""
    return [(row["stage"], row["workers"]) for row in run.rows if row["event"] == "zero_stage"]


def test_auto_is_the_run_of_the_stage_that_it_takes(trainer: Any) -> None:
    """The tiny model fits whole, so two workers take stage 0."""
    run = trainer.once("task.kind=sdpo", _AUTO, _SMALL, workers=2)
    whole = trainer.once("task.kind=sdpo", "cluster.zero_stage=0", _SMALL, workers=2)
    assert run.steps == whole.steps
    assert stages(run) == [(0, 2)] and run.finished["zero_stage"] == 0
    assert run.log.count("cluster.zero_stage=auto on 2 worker(s): stage 0, the smallest that fits") == 1
    assert stages(whole) == []
    manifest = json.loads(next((run.path / "checkpoints").glob("step-*/manifest.json")).read_text(encoding="utf-8"))
    assert manifest["zero_stage"] == 0


def test_a_resumed_run_keeps_its_stage(trainer: Any) -> None:
    """Bit for bit, because as many workers go on at the stage of the checkpoint."""
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *_SHARDED, workers=2, stop_after=2)
    run = trainer.train(run_dir, "task.kind=sdpo", _AUTO, _SMALL, workers=2)
    assert stages(run) == [(3, 2)] and "which the newest checkpoint has; a new run would take stage 0" in run.log
    assert run.steps == trainer.once(*_SHARDED, workers=2).steps


@pytest.mark.slow
def test_fewer_workers_take_the_stage_that_suits_them(trainer: Any) -> None:
    alone = trainer.new_dir()
    trainer.train(alone, *_SHARDED, workers=2, stop_after=2)
    assert stages(trainer.train(alone, "task.kind=sdpo", _AUTO, _SMALL)) == [(0, 1)]


@pytest.mark.parametrize(
    "changes",
    [pytest.param(("task.kind=sdpo",), marks=pytest.mark.slow), ("task.kind=sft", "adapter.kind=none")],
    ids=["adapter", "full"],
)
def test_a_second_copy_of_the_weights_changes_no_step(trainer: Any, changes: tuple[str, ...]) -> None:
    """Also after a checkpoint was read, which must not leave an old copy behind."""
    plain = trainer.once(*changes, "cluster.zero_stage=3", _SMALL, workers=2)
    run_dir: Path = trainer.new_dir()
    trainer.train(run_dir, *changes, *_COPY, _SMALL, workers=2, stop_after=2)
    copied = trainer.train(run_dir, *changes, *_COPY, _SMALL, workers=2)
    for a, b in zip(plain.steps, copied.steps, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    assert all(torch.allclose(copied.weights[name], value, atol=1e-6) for name, value in plain.weights.items())
