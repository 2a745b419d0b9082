"""Retrieval through the real loop: equal on any workers, stages and micro-batches; resumes exactly; ranks the same anywhere."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worker_processes import run_workers

SMALL = "train.max_tokens_per_micro_batch=100"
KEYS = (
    *("task.kind=retrieval", "task.retrieval.width=12", "train.targets_per_prompt=4", "train.global_batch_size=32"),
    *("optimizer.lr=0.01", "train.epochs=3", "train.max_steps=8"),
)
SAMPLED = "task.retrieval.num_sampled=24"


def saved(run: Any) -> dict[str, torch.Tensor]:
    """All that has trained, and the vectors of the items."""
    files = [load_file(run.path / "model" / name) for name in ("adapter_model.safetensors", "retrieval.safetensors")]
    return {name: value for file in files for name, value in file.items()}


def assert_near(run: Any, expected: Any) -> None:
    assert len(run.steps) == len(expected.steps) == 8
    for row, wanted in zip(run.steps, expected.steps, strict=True):
        keys = wanted.keys() - {"event"}
        assert {key: row[key] for key in keys} == pytest.approx({key: wanted[key] for key in keys}, rel=2e-4, abs=1e-5)
    for name, value in saved(expected).items():
        torch.testing.assert_close(saved(run)[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("more", [(), pytest.param((SAMPLED,), marks=pytest.mark.slow)])
def test_micro_batches_change_nothing(trainer: Any, more: tuple[str, ...]) -> None:
    run, expected = trainer.once(*KEYS, *more, SMALL), trainer.once(*KEYS, *more)
    assert run.steps[0]["tokens"] == expected.steps[0]["tokens"]
    assert_near(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        (SMALL,),
        ("cluster.zero_stage=2", SMALL, "task.retrieval.refresh_every=3"),
        ("cluster.zero_stage=3", SMALL, SAMPLED, "task.retrieval.refresh_every=2"),
    ],
)
def test_workers_and_stages_change_nothing(trainer: Any, changes: tuple[str, ...]) -> None:
    same = tuple(change for change in changes if not change.startswith("cluster"))
    assert_near(trainer.once(*KEYS, *changes, workers=2), trainer.once(*KEYS, *same))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage", "refresh"), [(1, 0, 0), (1, 0, 2), (2, 3, 2)])
def test_a_stopped_run_goes_on_bit_for_bit(trainer: Any, workers: int, stage: int, refresh: int) -> None:
    """It stops at step 3, after the vectors were refreshed at step 2."""
    changes = (*KEYS, f"cluster.zero_stage={stage}", f"task.retrieval.refresh_every={refresh}", SMALL)
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *changes, workers=workers, stop_after=3)
    state = load_file(run_dir / "checkpoints" / "step-00000003" / "state.safetensors")
    assert {"weight.project.linear.weight", "exp_avg.terms.weight"} <= state.keys()
    assert ("buffer.table.vectors" in state) == bool(refresh)
    run, expected = trainer.train(run_dir, *changes, workers=workers), trainer.once(*changes, workers=workers)
    assert run.steps == expected.steps
    assert all(torch.equal(saved(run)[name], value) for name, value in saved(expected).items())


@pytest.mark.slow
def test_the_whole_model_trains_too(trainer: Any) -> None:
    changes = (*KEYS, "adapter.kind=none", "optimizer.lr=0.002")
    run = trainer.once(*changes, "cluster.zero_stage=1", SMALL, workers=2)
    expected = trainer.once(*changes)
    losses = [row["loss"] for row in run.steps]
    assert losses == pytest.approx([row["loss"] for row in expected.steps], rel=2e-3)
    assert np.mean(losses[-2:]) < losses[0]
    assert (run.path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_states_are_the_same_from_two_workers(trainer: Any, tmp_path: Any) -> None:
    from rec_dist.config.schema import RunConfig
    from rec_dist.methods.language_model.ranking import EvaluateJob, gather_parts
    from rec_dist.methods.registry import method_of
    from rec_dist.methods.retrieval.ranking import encode_worker

    run = trainer.once(*KEYS)
    config = RunConfig.model_validate(trainer.config(run.path, *KEYS, SMALL))
    initial = method_of(config).ranker.weights(config, run.path / "model")
    found = []
    for workers in (1, 2):
        folder = tmp_path / f"on-{workers}"
        folder.mkdir()
        job = EvaluateJob(config.model_dump(), str(folder), initial, run.path / "model", pooling="mean")
        run_workers(encode_worker, [job] * workers, tmp_path / f"workers-{workers}")
        found.append(np.stack(list(gather_parts(folder))))
    assert found[0].shape == (20, 32)
    assert not np.isnan(found[0]).any()
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
