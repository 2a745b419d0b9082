"""A model in bfloat16 on CPUs: what trains is float32 in the engine, in checkpoints and in model/, at every ZeRO stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from worker_processes import run_command

BFLOAT16 = ("task.kind=sdpo", "model.dtype=bfloat16")
_SMALL_BATCHES = "train.max_tokens_per_micro_batch=120"
_VARIANTS = {
    "two workers, small micro-batches": (2, (_SMALL_BATCHES,)),
    "ZeRO-1, two workers": (2, ("cluster.zero_stage=1",)),
    "ZeRO-2, two workers": (2, ("cluster.zero_stage=2", _SMALL_BATCHES)),
    "ZeRO-3": (1, ("cluster.zero_stage=3",)),
    "ZeRO-3, two workers, recomputation": (2, ("cluster.zero_stage=3", "model.activation_checkpointing=true", _SMALL_BATCHES)),
}


def norm_of(weights: dict[str, torch.Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([value.float() for value in weights.values()]))


def distance(run: Any, other: Any) -> float:
    """Of the trained weights, relative to the other's."""
    assert run.weights.keys() == other.weights.keys()
    return norm_of({name: value - other.weights[name] for name, value in run.weights.items()}) / norm_of(other.weights)


def test_it_trains_as_float32_does_within_the_rounding_of_bfloat16(trainer: Any) -> None:
    run, exact = trainer.once(*BFLOAT16), trainer.once("task.kind=sdpo")
    for row, wanted in zip(run.steps, exact.steps, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=0.02)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.1)
    assert run.steps != exact.steps
    assert 0 < distance(run, exact) < 0.1


def test_frozen_weights_are_bfloat16_and_what_trains_is_float32_everywhere(trainer: Any) -> None:
    for stage in (0, 3):
        run, exact = (trainer.once(*words, f"cluster.zero_stage={stage}") for words in (BFLOAT16, ("task.kind=sdpo",)))
        state = load_file(next(run.path.glob("checkpoints/step-*4/state.safetensors")))
        assert all(value.dtype == torch.float32 for value in (*run.weights.values(), *state.values()))
        assert any(not torch.equal(value, value.bfloat16().float()) for value in run.weights.values())
        adapter = sum(4 * value.numel() for value in run.weights.values())
        whole, exact_whole = (each.finished["parameter_bytes_whole"] for each in (run, exact))
        assert whole - adapter == (exact_whole - adapter) // 2


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.slow if name.startswith(("ZeRO-1", "ZeRO-2")) else ()) for name in _VARIANTS],
)
def test_world_size_stage_and_micro_batches_change_rounding_alone(trainer: Any, variant: str) -> None:
    workers, more = _VARIANTS[variant]
    run, expected = trainer.once(*BFLOAT16, *more, workers=workers), trainer.once(*BFLOAT16)
    for row, wanted in zip(run.steps, expected.steps, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=0.01)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.05)
    assert distance(run, expected) < 0.05


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_stopped_run_ends_bit_for_bit_like_an_undisturbed_one(trainer: Any, stage: int) -> None:
    changes = (*BFLOAT16, f"cluster.zero_stage={stage}")
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *changes, stop_after=2)
    run, expected = trainer.train(run_dir, *changes), trainer.once(*changes)
    assert run.steps == expected.steps
    assert all(torch.equal(value, expected.weights[name]) for name, value in run.weights.items())


def test_an_adapter_trains_on_from_the_unrounded_one(trainer: Any) -> None:
    """The online reference is a frozen copy of it, so the first loss is that of a policy that equals its reference."""
    first = trainer.once(*BFLOAT16)
    more = (f"train.init_from={first.path}", "task.reference=online", "train.seed=1", "cluster.zero_stage=3")
    run = trainer.once(*BFLOAT16, *more)
    assert run.steps[0]["loss"] == pytest.approx(torch.log(torch.tensor(4.0)).item(), rel=1e-5)
    assert 0 < distance(run, first) < 1


def test_a_model_that_trains_whole_runs_in_bfloat16_too(trainer: Any) -> None:
    run, exact = (
        trainer.once("task.kind=sft", "adapter.kind=none", "optimizer.lr=1e-3", *more) for more in (("model.dtype=bfloat16",), ())
    )
    assert all(value.dtype == torch.bfloat16 for value in run.weights.values())
    assert run.steps[-1]["loss"] == pytest.approx(exact.steps[-1]["loss"], rel=0.02)


def test_commands_keep_what_was_settled(tiny_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A run has begun in the dtype that this machine does not choose. `auto` goes on with it, also in evaluation."""
    from rec_dist.config.paths import pinned
    from rec_dist.config.schema import RunConfig
    from rec_dist.config.yaml_text import to_yaml
    from rec_dist.models.precision import choose_on_cpu
    from rec_dist.runtime.run_directory import RunDirectory

    own = choose_on_cpu().dtype
    other = {"float32": "bfloat16", "bfloat16": "float32"}[own]
    run, child = RunDirectory(tmp_path / "run"), tmp_path / "child"
    begun = pinned(RunConfig.model_validate(tiny_config(run.path, f"model.dtype={other}")))
    run.claim(begun.model_dump(mode="json"), to_yaml(begun))

    def command(*words: object) -> str:
        code, done = run_command(tmp_path / "out", *words)
        assert code == 0, done.err
        return done.err

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config(run.path, "model.dtype=auto")), encoding="utf-8")
    assert f"model.dtype={other}, as this run began" in command("train", config)
    assert yaml.safe_load(run.config_path.read_text(encoding="utf-8"))["model"]["dtype"] == other
    assert "was trained with" not in command("evaluate", run.path)
    assert run.rows()[-1]["dtype"] == other
    assert f"was trained with model.dtype={other}" in command("evaluate", run.path, f"model.dtype={own}")
    assert run.rows()[-1]["dtype"] == own
    log = command("train", config, f"train.run_dir={child}", f"train.init_from={run.path}")
    assert f"model.dtype={own}: " in log and f"was trained with model.dtype={other}, and this computes in {own}" in log
