"""The reference: cached log-probs equal those of the online pass, belong to the model the run started from, and are made once."""

import math
from pathlib import Path
from typing import Any

import pytest

_COMPARED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins")


def assert_same_steps(run: Any, expected: Any) -> None:
    """Leaves out the accuracies of step 1: policy and reference are equal there, and rounding decides which reward is larger."""
    assert len(run.steps) == len(expected.steps) > 1
    for row, wanted in zip(run.steps, expected.steps, strict=True):
        keys = [*_COMPARED, "rewards/accuracies"] if row["step"] > 1 else _COMPARED
        assert [row[key] for key in keys] == pytest.approx([wanted[key] for key in keys], rel=1e-5, abs=2e-6)


@pytest.fixture(scope="module")
def sft_dir(trainer: Any) -> Path:
    """A finished SFT run, on one worker."""
    path: Path = trainer.once("task.kind=sft").path
    return path


@pytest.mark.parametrize(("start", "workers", "stage"), [("base model", 1, 0), ("SFT run", 1, 0), ("SFT run", 2, 3)])
def test_cached_is_online(trainer: Any, sft_dir: Path, start: str, workers: int, stage: int) -> None:
    changes = ["task.kind=sdpo"] + ["cluster.zero_stage=3"] * (stage == 3) + [f"train.init_from={sft_dir}"] * (start == "SFT run")
    cached = trainer.once(*changes, workers=workers)
    online = trainer.once(*changes, "task.reference=online", workers=workers)
    assert_same_steps(online, cached)
    first = cached.steps[0]
    assert first["loss"] == pytest.approx(math.log(4), rel=1e-6)  # policy = reference: no preference among 1 + 3
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert abs(cached.steps[-1]["rewards/margins"]) > 1e-3  # later the policy has moved away from the reference
    assert (cached.path / "reference" / "manifest.json").is_file()
    assert not (online.path / "reference").exists()


def test_an_sft_start_is_no_base_start(trainer: Any, sft_dir: Path) -> None:
    """train.init_from has an effect: the same steps have other gradients."""
    base, started = trainer.once("task.kind=sdpo"), trainer.once("task.kind=sdpo", f"train.init_from={sft_dir}")
    assert started.steps[0]["grad_norm"] != pytest.approx(base.steps[0]["grad_norm"], rel=1e-2)


def test_refreshed_negatives_have_references_of_their_own(trainer: Any) -> None:
    changes = [
        "task.kind=sdpo",
        "negatives.refresh_each_epoch=true",
        "train.global_batch_size=256",
        "train.targets_per_prompt=8",
        "train.max_steps=6",
    ]
    cached = trainer.once(*changes, "train.epochs=2")
    online = trainer.once(*changes, "train.epochs=2", "task.reference=online")
    assert cached.steps[-1]["epoch"] == 1
    assert_same_steps(online, cached)


def test_a_restart_reads_the_reference_back(trainer: Any) -> None:
    run_dir = trainer.new_dir()
    trainer.train(run_dir, "task.kind=sdpo", stop_after=2)
    run = trainer.train(run_dir, "task.kind=sdpo")
    events = [row["event"] for row in run.rows]
    assert events.count("reference") == 1
    assert events.count("resume") == 1
