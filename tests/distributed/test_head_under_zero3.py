"""An untied head, and one tied to the input embedding, train the same sharded by ZeRO-3 as on one worker."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

_FULL = ("adapter.kind=none", "task.reference=cached", "optimizer.lr=1e-3")


def untied(folder: Path, tied: Path) -> Path:
    """The tiny model with a head that differs from its embedding."""
    shutil.copytree(tied, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(weights["model.embed_tokens.weight"].shape, generator=generator) * 0.02
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "trains", "ties"),
    [
        ("sdpo", "all", "tied"),
        ("sdpo", "all", "untied"),
        ("msl", "all", "tied"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("msl", "all", "untied"), ("sdpo", "adapter", "tied"))),
        pytest.param("sdpo", "adapter", "untied", marks=pytest.mark.slow),
    ],
)
def test_two_sharded_workers_train_as_one_does(
    trainer: Any, tiny_model_dir: Path, tmp_path: Path, kind: str, trains: str, ties: str
) -> None:
    model = tiny_model_dir if ties == "tied" else untied(tmp_path / "model", tiny_model_dir)
    changes = (*(_FULL if trains == "all" else ()), f"task.kind={kind}", "train.max_steps=3", f"model.path={model}")
    one = trainer.train(trainer.new_dir(), *changes)
    two = trainer.train(trainer.new_dir(), *changes, "cluster.zero_stage=3", "train.max_tokens_per_micro_batch=200", workers=2)
    for row, wanted in zip(two.steps, one.steps, strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((wanted["loss"], wanted["grad_norm"]), rel=1e-5)
    assert two.weights.keys() - {"lm_head.weight"} == one.weights.keys() - {"lm_head.weight"}
    if trains == "all" and ties == "tied":  # transformers leaves the copy out of a whole model but not out of gathered weights
        assert torch.equal(two.weights["lm_head.weight"], two.weights["model.embed_tokens.weight"])
    assert ("lm_head.weight" in one.weights) is (trains == "all" and ties == "untied")
    for name, value in one.weights.items():
        torch.testing.assert_close(two.weights[name], value, rtol=1e-4, atol=1e-5)
    if trains == "all":
        head = "lm_head.weight" if ties == "untied" else "model.embed_tokens.weight"
        before = load_file(model / "model.safetensors")[head]
        assert float((one.weights[head] - before).abs().max()) > 1e-4  # it trained
