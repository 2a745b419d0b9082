"""Validation during training: the right number, equal on any workers and packing, and without effect on the training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worker_processes import WorkerFailedError, run_command

pytestmark = pytest.mark.slow  # minutes on a busy machine
_RUN = ("train.max_steps=6", "train.global_batch_size=4", "checkpoint.every_steps=2")
_SDPO = (*_RUN, "task.kind=sdpo", "train.max_tokens_per_micro_batch=200", "adapter.dropout=0.3")
_VALID = ("checkpoint.validation_examples=20",)


def validations(run: Any) -> list[dict[str, Any]]:
    rows = [row for row in run.rows if row["event"] == "validation"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_same_training(run: Any, expected: Any) -> None:
    assert run.steps == expected.steps
    assert all(torch.equal(run.weights[name], value) for name, value in expected.weights.items())


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        (1, ("cluster.zero_stage=0",)),
        (2, ("cluster.zero_stage=3",)),
        (2, ("cluster.zero_stage=2",)),
        (1, ("cluster.zero_stage=3", "task.reference=online")),
    ],
)
def test_a_validation_changes_no_bit_of_the_training(trainer: Any, workers: int, changes: tuple[str, ...]) -> None:
    """Dropout is on in training, so a generator that validation advanced, or a mode that it left behind, would show."""
    plain = trainer.once(*_SDPO, *changes, workers=workers)
    validated = trainer.once(*_SDPO, *_VALID, *changes, workers=workers)
    assert_same_training(validated, plain)
    assert [row["step"] for row in validations(validated)] == [2, 4, 6]
    assert validations(plain) == []


@pytest.mark.parametrize("kind", [pytest.param("sdpo", marks=pytest.mark.quick), "sft"])
def test_a_validation_depends_on_no_worker_stage_or_micro_batch(trainer: Any, kind: str) -> None:
    changes = (*_RUN, *_VALID, f"task.kind={kind}")
    one = validations(trainer.once(*changes, "cluster.zero_stage=0"))
    two = validations(trainer.once(*changes, "cluster.zero_stage=3", "train.max_tokens_per_micro_batch=150", workers=2))
    assert [row["step"] for row in one] == [2, 4, 6]
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        assert row["examples"] == 20
        numbers = [key for key in row if key.startswith("valid_")]
        assert len(numbers) == (5 if kind == "sdpo" else 1)
        assert [other[key] for key in numbers] == pytest.approx([row[key] for key in numbers], rel=2e-5, abs=1e-6)
    losses = [row["valid_loss"] for row in one]
    assert len(set(losses)) == 3, "training moves it"


def test_it_is_the_loss_that_an_evaluation_of_the_saved_model_has(trainer: Any, tmp_path: Path) -> None:
    """All validation targets: minus the mean log-prob a token, from the predictions of `rec-dist evaluate`.

    The evaluation's code is separate.
    """
    from rec_dist.config.load import load_config
    from rec_dist.data.artifacts.predictions import Predictions
    from rec_dist.data.dataset.prepared_data import PreparedData
    from rec_dist.methods.language_model.builders import build_builder

    run = trainer.once(*_RUN, "task.kind=sft", "checkpoint.validation_examples=100000", "cluster.zero_stage=0")
    code, child = run_command(tmp_path, "evaluate", run.path, "evaluate.split=valid", "evaluate.max_users=null")
    assert code == 0, child.err
    predictions = Predictions.read(run.path / "predictions.arrow")
    config = load_config(run.path / "config.yaml", [])
    builder = build_builder(config, Path(config.model.path), PreparedData.open(config.data.path))
    assert len(predictions.targets) == validations(run)[-1]["examples"] == 60
    total = tokens = 0.0
    for target, candidates, scores in zip(predictions.targets, predictions.candidates, predictions.scores, strict=True):
        total -= float(scores[np.flatnonzero(candidates == target)[0]])
        tokens += int(builder.titles.lengths[target]) + len(builder.pieces.end)
    assert validations(run)[-1]["valid_loss"] == pytest.approx(total / tokens, rel=1e-5)


_FULL = ("adapter.kind=none", "optimizer.lr=0.1", "task.kind=sft")  # learns until step 4 and gets worse again
_DIVERGES = (*_RUN, *_VALID, *_FULL, "checkpoint.keep_best=valid_loss", "checkpoint.keep=1")


def test_the_best_is_kept_beside_the_newest_and_used(trainer: Any) -> None:
    """The rate is so high that the loss gets worse, so the best is not the last. A stop in between changes nothing."""
    run = trainer.once(*_DIVERGES, "checkpoint.use_best=true")
    losses = {row["step"]: row["valid_loss"] for row in validations(run)}
    best = min(losses, key=lambda step: losses[step])
    assert best < 6, losses
    assert folders(run.path) == [f"step-{best:08d}", "step-00000006"]
    assert run.finished["model_step"] == best
    assert run.finished["step"] == 6
    assert [row["best"] for row in run.rows if row["event"] == "checkpoint"][-1] == best
    state = load_file(run.path / "checkpoints" / f"step-{best:08d}" / "state.safetensors")
    assert all(torch.equal(state[f"weight.model.{name}"], value) for name, value in run.weights.items())
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *_DIVERGES, "checkpoint.use_best=true", stop_after=5)
    assert f"step-{best:08d}" in folders(run_dir)
    again = trainer.train(run_dir, *_DIVERGES, "checkpoint.use_best=true")
    assert_same_training(again, run)
    assert validations(again) == validations(run)
    last = trainer.once(*_DIVERGES)
    assert last.finished["model_step"] == 6
    assert any(not torch.equal(last.weights[name], value) for name, value in run.weights.items())


def test_a_damaged_best_is_passed_over_loudly(trainer: Any) -> None:
    expected = trainer.once(*_DIVERGES, "checkpoint.use_best=true")
    best = expected.finished["model_step"]
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *_DIVERGES, "checkpoint.use_best=true", stop_after=5)
    path = run_dir / "checkpoints" / f"step-{best:08d}" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 16
    path.write_bytes(data)
    run = trainer.train(run_dir, *_DIVERGES, "checkpoint.use_best=true")
    assert run.log.count("WARNING: checkpoint passed over") == 1
    assert run.finished["model_step"] == 6
    assert f"step-{best:08d}.bad" in folders(run_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("checkpoint.keep_best=valid_loss",), r"needs a validation; set checkpoint\.validation_examples"),
        (("checkpoint.use_best=true",), r"checkpoint\.use_best=true needs checkpoint\.keep_best"),
    ],
)
def test_what_cannot_take_effect_is_refused(trainer: Any, changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(WorkerFailedError, match=message) as caught:
        trainer.train(trainer.new_dir(), *_RUN, *changes)
    assert caught.value.kind == "UserError"


def test_a_sequential_recommender_is_validated_too(trainer: Any) -> None:
    changes = (
        *_RUN,
        "task.kind=sequential",
        "train.max_tokens_per_micro_batch=2048",
        "optimizer.lr=1e-2",
        "checkpoint.validation_examples=40",
    )
    run = trainer.once(*changes)
    losses = [row["valid_loss"] for row in validations(run)]
    assert len(losses) == 3
    assert losses[2] < losses[0]


def test_verify_finds_one_flipped_byte(trainer: Any, tmp_path: Path) -> None:
    run = trainer.once(*_RUN, "task.kind=sft", "cluster.zero_stage=0", "checkpoint.keep=2")
    assert run_command(tmp_path, "verify", run.path)[0] == 0
    said = {"state.safetensors": "has changed since it was written", "manifest.json": "does not match its checksum"}
    for name, words in said.items():
        path = run.path / "checkpoints" / "step-00000004" / name
        whole = path.read_bytes()
        data = bytearray(whole)
        place = whole.index(b'"sha256": "') + 12 if name == "manifest.json" else len(whole) // 3
        data[place] ^= 1
        path.write_bytes(data)
        code, child = run_command(tmp_path, "verify", run.path)
        assert code == 2
        assert child.err.startswith("error: ")
        assert f"step-00000004: {name}" in child.err and words in child.err
        assert "step-00000006" not in child.err
        path.write_bytes(whole)
    manifest = json.loads((run.path / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert manifest["sampler"] == {
        "seed": 0,
        "num_examples": manifest["sampler"]["num_examples"],
        "examples_per_step": 4,
        "step": 6,
        "epoch": 0,
    }
