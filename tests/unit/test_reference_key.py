"""What cached reference log-probs belong to: they are computed again if any of it differs, and for no other reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rec_dist.config.schema import RunConfig
from rec_dist.methods.registry import build_task, find_initial_weights

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def key(make: Make, model: Path, *changes: str) -> str:
    config = RunConfig.model_validate(make(model.parent / "run", "task.kind=sdpo", f"model.path={model}", *changes))
    reference = build_task(config, find_initial_weights(config), "cpu").reference
    assert reference is not None
    return reference.key


@pytest.mark.parametrize(
    "change",
    [
        "prompt.instruction=They watched",
        "prompt.max_history=4",
        "prompt.item_prefix=then",
        "negatives.num=2",
        "negatives.kind=popularity",
        "negatives.refresh_each_epoch=true",
        "train.seed=1",
        "train.max_steps=5",
        "train.epochs=3",
        "train.global_batch_size=4",
        "train.targets_per_prompt=2",
        "train.shuffle_window=64",
    ],
)
def test_a_change_of_prompt_or_negatives_or_plan_is_another_reference(tiny_config: Make, model: Path, change: str) -> None:
    assert key(tiny_config, model, change) != key(tiny_config, model)


def test_a_change_of_the_model_is_another_reference(tiny_config: Make, model: Path) -> None:
    found = {key(tiny_config, model)}
    weights, config = model / "model.safetensors", model / "config.json"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found.add(key(tiny_config, model))
    value = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**value, "rms_norm_eps": 0.1}), encoding="utf-8")  # the same weights, other log-probs
    found.add(key(tiny_config, model))
    assert len(found) == 3


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.lr=1e-3",
        "task.beta=0.3",
        "train.max_tokens_per_micro_batch=300",
        "model.attention=sdpa",
        "cluster.zero_stage=3",
        "adapter.rank=2",
    ],
)
def test_what_changes_no_reference_keeps_it(tiny_config: Make, model: Path, change: str) -> None:
    assert key(tiny_config, model, change) == key(tiny_config, model)
