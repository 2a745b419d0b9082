"""Train on ZeRO-3 shards, save, and load with the plain libraries: the served model gives the scores that evaluation measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worker_processes import run_command

# 32 x 32 = 1,024 weights, also of the adapter, are more than the 16 x 32 that stay whole on every rank.
_SHARDED = ("task.kind=sft", "cluster.zero_stage=3", "train.global_batch_size=4", "adapter.rank=32", "adapter.alpha=64")


def evaluated(run: Any, folder: Path, *overrides: str) -> Any:
    """The predictions of `rec-dist evaluate RUN`, made in this process."""
    from rec_dist.data.artifacts.predictions import Predictions

    code, child = run_command(folder, "evaluate", run.path, "evaluate.max_users=3", "cluster.zero_stage=0", *overrides)
    assert code == 0, child.err
    return Predictions.read(run.path / "predictions.arrow")


def replicated_logps(model: Any, run: Any, data_dir: Path, user_id: int, position: int, candidates: np.ndarray) -> list[float]:
    """What a server computes that only knows model/: sums of log-probs of each completion after its own copy of the prompt."""
    from transformers import AutoTokenizer

    from rec_dist.data.dataset.prepared_data import PreparedData

    prompt = json.loads((run.path / "model" / "prompt.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(str(run.path / "model"))
    data = PreparedData.open(data_dir)
    title = lambda item: tokenizer(f" {data.titles[item]}", add_special_tokens=False).input_ids
    split = data.split("test")
    history = split.items_of(int(np.searchsorted(split.user_ids, user_id)))[:position][-prompt["max_history"] :]
    tokens = list(prompt["begin"])
    for item in history.tolist():
        tokens += prompt["item_prefix"] + title(item)
    tokens += prompt["tail"]
    sums = []
    for item in candidates.tolist():
        answer = title(item) + prompt["end"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens + answer])).logits[0, len(tokens) - 1 : -1]
        sums.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
    return sums


def assert_serves(model: Any, run: Any, data_dir: Path, predictions: Any) -> None:
    for row in range(3):
        at = (int(predictions.user_ids[row]), int(predictions.positions[row]), predictions.candidates[row])
        assert replicated_logps(model, run, data_dir, *at) == pytest.approx(predictions.scores[row].tolist(), abs=1e-4)


def test_adapter(trainer: Any, tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = trainer.once(*_SHARDED, workers=2)
    whole, local = run.finished["parameter_bytes_whole"], run.finished["parameter_bytes_rank0"]
    assert whole / 2 < local < 0.55 * whole
    assert run.weights
    assert all(value.numel() > 0 for value in run.weights.values())
    plain = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float32).eval()
    predictions = evaluated(run, tmp_path)
    base = replicated_logps(
        plain, run, tiny_data, int(predictions.user_ids[0]), int(predictions.positions[0]), predictions.candidates[0]
    )
    assert base != pytest.approx(predictions.scores[0].tolist(), abs=1e-2)  # the adapter matters
    model = PeftModel.from_pretrained(plain, str(run.path / "model")).eval()
    assert_serves(model, run, tiny_data, predictions)


def test_full_model_with_tied_embeddings(trainer: Any, tiny_data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    changes = ("adapter.kind=none", "optimizer.lr=1e-3", "train.global_batch_size=4")
    run = trainer.once("task.kind=sft", "cluster.zero_stage=3", *changes, workers=2)
    single = trainer.once("task.kind=sft", *changes)
    model, loading = AutoModelForCausalLM.from_pretrained(str(run.path / "model"), dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, value in single.weights.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    assert_serves(model.eval(), run, tiny_data, evaluated(run, tmp_path))


def test_a_run_from_a_full_model(trainer: Any, tmp_path: Path) -> None:
    """LoRA on a model that an earlier run fine-tuned whole. Training and evaluation find it through train.init_from."""
    full = trainer.once("task.kind=sft", "adapter.kind=none", "optimizer.lr=1e-3", "train.global_batch_size=4")
    run = trainer.once("task.kind=sdpo", f"train.init_from={full.path}")
    assert run.steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert np.isfinite(np.concatenate(evaluated(run, tmp_path).scores)).all()
