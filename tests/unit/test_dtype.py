"""model.dtype=auto is settled once, stands in config.yaml, and is kept; another dtype elsewhere is reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rec_dist.commands.dtype import difference, dtype_in, saved_dtype, settle_dtype
from rec_dist.config.schema import ClusterConfig, RunConfig
from rec_dist.launch.dtype import choose_dtype, why_slow
from rec_dist.methods.registry import build_task, find_initial_weights
from rec_dist.models.precision import bfloat16_instructions, choose_on_cpu

MakeConfig = Callable[..., dict[str, Any]]


def config_of(tiny_config: MakeConfig, folder: Path, *changes: Any) -> RunConfig:
    return RunConfig.model_validate(tiny_config(folder, *changes))


def test_the_choice_says_what_it_is_based_on() -> None:
    choice = choose_on_cpu()
    if bfloat16_instructions() is None:
        assert choice.dtype == "float32" and "no instructions" in choice.why
    else:
        assert f"({bfloat16_instructions()})" in choice.why and "times as fast" in choice.why


def test_auto_becomes_what_the_workers_are_good_at(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config, lines = settle_dtype(config_of(tiny_config, tmp_path, "model.dtype=auto"))
    assert config.model.dtype == choose_on_cpu().dtype
    assert len(lines) == 1 and lines[0].startswith(f"model.dtype={config.model.dtype}: ")
    assert choose_dtype(ClusterConfig(launcher="ray", use_gpu=True)).dtype == "bfloat16"


@pytest.mark.parametrize("earlier", ["float32", "bfloat16"])
def test_a_run_keeps_the_dtype_that_it_began_with(earlier: str, tiny_config: MakeConfig, tmp_path: Path) -> None:
    config, lines = settle_dtype(config_of(tiny_config, tmp_path, "model.dtype=auto"), earlier)
    assert config.model.dtype == earlier
    assert lines[0] == f"model.dtype={earlier}, as this run began"
    assert settle_dtype(config_of(tiny_config, tmp_path, f"model.dtype={earlier}"))[0].model.dtype == earlier


def test_a_cpu_without_the_instructions_is_warned_of() -> None:
    slow = why_slow(ClusterConfig(launcher="local"), "bfloat16")
    assert (slow is None) == (bfloat16_instructions() is not None)
    assert why_slow(ClusterConfig(launcher="local"), "float32") is None


def test_a_recommender_has_nothing_to_choose(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(tiny_config, tmp_path, "model.dtype=auto", "task.kind=sequential")
    assert settle_dtype(config) == (config, [])


def test_a_difference_to_another_run_is_named(tiny_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": {"dtype": "bfloat16"}}), encoding="utf-8")
    (line,) = difference(config_of(tiny_config, tmp_path / "new"), tmp_path, "train.init_from")
    assert "train.init_from" in line and "model.dtype=bfloat16" in line and "float32" in line
    assert difference(config_of(tiny_config, tmp_path / "new", "model.dtype=bfloat16"), tmp_path, "train.init_from") == []
    assert difference(config_of(tiny_config, tmp_path / "new"), tmp_path / "absent", "train.init_from") == []


@pytest.mark.parametrize("saved", [None, [], {}, {"model": 3}, {"model": {"dtype": "auto"}}, {"model": {"dtype": 7}}])
def test_a_configuration_without_a_dtype_has_none(saved: object, tmp_path: Path) -> None:
    assert dtype_in(saved) is None
    (tmp_path / "config.json").write_text(json.dumps(saved)[:-1] or "{", encoding="utf-8")  # cut off
    assert saved_dtype(tmp_path) is None


def test_only_what_trains_on_a_frozen_model_is_float32(tiny_config: MakeConfig, tmp_path: Path) -> None:
    cases = {
        ("model.dtype=bfloat16",): (torch.bfloat16, True),
        ("model.dtype=bfloat16", "adapter.kind=none"): (torch.bfloat16, False),
        ("model.dtype=float32",): (torch.float32, False),
    }
    for changes, expected in cases.items():
        config = config_of(tiny_config, tmp_path, *changes)
        initial = find_initial_weights(config)
        model = build_task(config, initial, "cpu").model
        assert (model.dtype, model.spec is not None and model.spec.trains_float32) == expected
        on_gpu = build_task(config, initial, "cuda:0").model.spec
        assert on_gpu is not None and not on_gpu.trains_float32, "DeepSpeed keeps a float32 copy there"
