"""What model.fused_layers accepts and says. What the layers compute is tested in tests/triton."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rec_dist.errors import UserError
from rec_dist.models import fused_layers
from rec_dist.models.fused_layers import check_fused, notes_on_layers, wants_fused

LLAMA = SimpleNamespace(model_type="llama")


def test_auto_and_none_leave_layers_as_they_are() -> None:
    assert not any(wants_fused(wanted, LLAMA, device=device) for wanted in ("auto", "none") for device in ("cpu", "cuda:0"))


def test_auto_says_on_a_gpu_that_layers_are_not_fused() -> None:
    (note,) = notes_on_layers("auto", "cuda:0")
    assert "model.fused_layers=auto" in note
    assert notes_on_layers("auto", "cpu") == notes_on_layers("liger", "cuda:0") == notes_on_layers("none", "cuda:0") == []


@pytest.mark.parametrize(
    ("device", "installed", "family", "words"),
    [
        ("cpu", True, "llama", "needs a CUDA device.* cpu"),
        ("cuda:0", False, "llama", "pip install liger-kernel"),
        ("cuda:0", True, "gpt2", "gpt2.*only llama"),
    ],
)
def test_what_liger_needs(device: str, installed: bool, family: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, "find_spec", lambda name: importlib.util.find_spec("torch") if installed else None)
    with pytest.raises(UserError, match=f"model.fused_layers=liger .*{words}.*set model.fused_layers=none"):
        wants_fused("liger", SimpleNamespace(model_type=family), device=device)
    if installed:
        assert wants_fused("liger", LLAMA, device="cuda:0")


def test_a_model_without_fused_layers_is_not_scored_again() -> None:
    def score() -> Any:
        raise AssertionError("a pass that no one needs")

    check_fused(nn.Linear(2, 2), score, torch.float32)
