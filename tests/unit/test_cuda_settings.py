"""What a worker on a GPU sets in PyTorch, and gives back. Runs without a GPU, since nothing is allocated."""

import os

import pytest
import torch

from rec_dist.engine.process_group import _settings_of_cuda
from rec_dist.runtime.world import World


def test_a_gpu_worker_grows_segments_and_sums_in_float32_and_gives_both_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction
    with _settings_of_cuda(World(device="cuda:0")):
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        assert products.allow_bf16_reduced_precision_reduction is False
    assert products.allow_bf16_reduced_precision_reduction == before


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_you_have_set_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    with _settings_of_cuda(World(device="cuda:0")):
        assert os.environ[name] == "max_split_size_mb:512"
        assert len({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()) == 1


def test_a_cpu_worker_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    with _settings_of_cuda(World()):
        assert "PYTORCH_ALLOC_CONF" not in os.environ
