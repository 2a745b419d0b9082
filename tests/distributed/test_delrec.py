"""DELRec through the real loop: equal on any workers and ZeRO stage, resumed exactly, and both stages one after another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worker_processes import run_command

NUM_VIRTUAL = 20  # 20 * 32 weights are more than the 16 * 32 that ZeRO-3 keeps whole on every rank
_VECTORS = f"prompt.num_virtual={NUM_VIRTUAL}"
_DISTILL = (
    "task.kind=delrec_distill",
    "adapter.kind=soft_prompt",
    _VECTORS,
    "task.delrec.top_h=3",
    "task.delrec.teacher=random",
    "negatives.num=5",
    "train.global_batch_size=4",
    "train.max_tokens_per_micro_batch=4096",
    "optimizer.lr=0.05",
)
_SMALL = "train.max_tokens_per_micro_batch=400"  # one or two positions a micro-batch


def assert_near(run: Any, expected: Any) -> None:
    """Every number of every step, and the weights."""
    assert len(run.steps) == len(expected.steps)
    for row, wanted in zip(run.steps, expected.steps, strict=True):
        keys = wanted.keys() - {"event"}
        assert {key: row[key] for key in keys} == pytest.approx({key: wanted[key] for key in keys}, rel=2e-5, abs=1e-6)
    for name, value in expected.weights.items():
        torch.testing.assert_close(run.weights[name], value, rtol=2e-5, atol=2e-5)


def initial_prompt(tiny_model_dir: Path) -> torch.Tensor:
    return load_file(tiny_model_dir / "model.safetensors")["model.embed_tokens.weight"]


def test_distillation_trains_and_weighs_its_objectives(trainer: Any, tiny_model_dir: Path) -> None:
    run = trainer.once(*_DISTILL, "train.max_steps=12")
    (values,) = run.weights.values()
    assert values.shape == (NUM_VIRTUAL, 32)
    rows = initial_prompt(tiny_model_dir)
    assert float(torch.cdist(values, rows).min(dim=1).values.min()) > 1e-3, "some vector has not moved"
    weights = [row["weight/temporal"] for row in run.steps]
    assert weights[0] == 0.5
    assert all(0 < weight < 1 and weight != 0.5 for weight in weights[1:])
    for row in run.steps:
        weight = row["weight/temporal"]
        assert row["loss"] == pytest.approx(weight * row["loss/temporal"] + (1 - weight) * row["loss/pattern"], rel=1e-5)
    assert {path.name for path in (run.path / "model").iterdir()} >= {"soft_prompt.safetensors", "base.json", "prompt.json"}


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        (1, (_SMALL,)),
        pytest.param(2, (_SMALL,), marks=pytest.mark.slow),
        pytest.param(2, ("cluster.zero_stage=2", _SMALL), marks=pytest.mark.slow),
        (2, ("cluster.zero_stage=3", _SMALL)),
    ],
)
def test_workers_stages_and_micro_batches_change_nothing(trainer: Any, workers: int, changes: tuple[str, ...]) -> None:
    assert_near(trainer.once(*_DISTILL, *changes, workers=workers), trainer.once(*_DISTILL))


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_vectors_on_a_bfloat16_model_train_in_float32(trainer: Any, workers: int, stage: int) -> None:
    run, exact = (
        trainer.once(*_DISTILL, f"cluster.zero_stage={stage}", *more, workers=workers) for more in (("model.dtype=bfloat16",), ())
    )
    (values,), (wanted,) = run.weights.values(), exact.weights.values()
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())
    assert float((values - wanted).norm()) < 0.1 * float(wanted.norm())
    assert [row["loss"] for row in run.steps] == pytest.approx([row["loss"] for row in exact.steps], rel=0.03)


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_stopped_distillation_goes_on_with_its_weights(trainer: Any, workers: int, stage: int) -> None:
    changes = (*_DISTILL, f"cluster.zero_stage={stage}", _SMALL)
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *changes, workers=workers, stop_after=3)
    state = load_file(run_dir / "checkpoints" / "step-00000003" / "state.safetensors")
    assert [name for name in state if name.startswith("buffer.")] == ["buffer.loss.weights"]
    assert state["buffer.loss.weights"].tolist() != [0.5, 0.5]
    run, expected = trainer.train(run_dir, *changes, workers=workers), trainer.once(*changes, workers=workers)
    assert run.steps == expected.steps
    assert all(torch.equal(run.weights[name], value) for name, value in expected.weights.items())


def second_stage(trainer: Any, *changes: str, workers: int = 1) -> Any:
    distilled = trainer.once(*_DISTILL)
    lora = (
        "task.kind=delrec",
        "negatives.num=5",
        _VECTORS,
        f"train.init_from={distilled.path}",
        "adapter.target_modules=[q_proj,v_proj]",
    )
    return trainer.once(*lora, *changes, workers=workers)


def soft_prompt(run: Any) -> torch.Tensor:
    return load_file(run.path / "model" / "soft_prompt.safetensors")["prompt"]


def adapter(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.path / "model" / "adapter_model.safetensors")


def test_stage_two_trains_lora_and_keeps_the_prompt(trainer: Any) -> None:
    run = second_stage(trainer)
    assert torch.equal(soft_prompt(run), soft_prompt(trainer.once(*_DISTILL)))
    names = adapter(run)
    assert all("lora" in name and ("q_proj" in name or "v_proj" in name) for name in names)
    assert max(float(value.abs().max()) for name, value in names.items() if "lora_B" in name) > 1e-3
    assert "parameters train" in run.log
    sharded = second_stage(trainer, "cluster.zero_stage=3", "train.max_tokens_per_micro_batch=300", workers=2)
    for row, wanted in zip(sharded.steps, run.steps, strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((wanted["loss"], wanted["grad_norm"]), rel=2e-5)
    for name, value in names.items():
        torch.testing.assert_close(adapter(sharded)[name], value, rtol=2e-5, atol=2e-5)


def test_the_prompt_matters_to_stage_two(trainer: Any) -> None:
    plain = trainer.once("task.kind=delrec", "negatives.num=5", "adapter.target_modules=[q_proj,v_proj]")
    assert plain.steps[0]["loss"] != pytest.approx(second_stage(trainer).steps[0]["loss"], rel=1e-4)


def test_sdpo_goes_on_from_stage_two(trainer: Any) -> None:
    before = second_stage(trainer)
    run = trainer.once("task.kind=sdpo", _VECTORS, f"train.init_from={before.path}", "adapter.target_modules=[q_proj,v_proj]")
    assert run.steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert torch.equal(soft_prompt(run), soft_prompt(before))


def evaluated(run: Any, folder: Path, *overrides: str) -> Any:
    from rec_dist.data.artifacts.predictions import Predictions

    code, child = run_command(folder, "evaluate", run.path, "evaluate.max_users=3", *overrides)
    assert code == 0, child.err
    return Predictions.read(run.path / "predictions.arrow")


def test_both_stages_are_evaluated_with_what_they_trained(trainer: Any, tmp_path: Path) -> None:
    stages = [evaluated(run, tmp_path / name) for name, run in (("one", trainer.once(*_DISTILL)), ("two", second_stage(trainer)))]
    assert not np.allclose(stages[0].scores[0], stages[1].scores[0])
    config = json.loads((trainer.once(*_DISTILL).path / "config.json").read_text(encoding="utf-8"))
    path = tmp_path / "base.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    code, child = run_command(tmp_path, "evaluate", path)
    assert code == 2
    assert "prompt.num_virtual" in child.err


def plain_logps(folder: Path, data_dir: Path, row: Any, *, left_out: bool) -> list[float]:
    """The score from a server that only knows text: the prompt as one string, in plain transformers.

    left_out: the suppressed tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rec_dist.data.dataset.prepared_data import PreparedData

    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    settings = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    data = PreparedData.open(data_dir)
    user, position, candidates = row
    split = data.split("test")
    history = split.items_of(int(np.searchsorted(split.user_ids, user)))[:position][-settings["max_history"] :]
    prompt = (
        settings["soft_prompt_text"] + settings["instruction"] + "".join(f"\n- {data.titles[item]}" for item in history) + "\n-"
    )
    tokens, sums = tokenizer(prompt).input_ids, []
    for item in candidates.tolist():
        answer = tokenizer(f" {data.titles[item]}\n").input_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens + answer])).logits[0, len(tokens) - 1 : -1]
        if left_out:
            logits[:, model.generation_config.suppress_tokens] = -torch.inf
        sums.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
    return sums


@pytest.mark.parametrize("stage", ["distilled prompt", "both stages"])
def test_the_served_form_is_the_trained_form(trainer: Any, stage: str, tiny_data: Path, tmp_path: Path) -> None:
    run = second_stage(trainer) if stage == "both stages" else trainer.once(*_DISTILL)
    predictions = evaluated(run, tmp_path)
    code, child = run_command(tmp_path, "export", run.path, "--out", tmp_path / "served")
    assert code == 0, child.err
    for place in range(3):
        row = (int(predictions.user_ids[place]), int(predictions.positions[place]), predictions.candidates[place])
        expected = predictions.scores[place].tolist()
        assert plain_logps(tmp_path / "served", tiny_data, row, left_out=True) == pytest.approx(expected, abs=1e-4)
    assert plain_logps(tmp_path / "served", tiny_data, row, left_out=False) != pytest.approx(expected, abs=1e-4)
    code, child = run_command(tmp_path, "export", run.path, "--out", tmp_path / "served")
    assert (code, "exists" in child.err) == (2, True)
