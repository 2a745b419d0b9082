"""A run belongs to the contents that its inputs had when it began, not to their paths.

Otherwise it would resume from, or report on, something else.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rec_dist.commands.train import bind_inputs
from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.runtime.run_directory import RunDirectory


@pytest.fixture
def config(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> RunConfig:
    return RunConfig.model_validate(tiny_config(tmp_path / "run"))


def test_a_changed_model_or_adapter_is_refused(tmp_path: Path, tiny_model_dir: Path, config: RunConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(tiny_model_dir, model)
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"first")
    bind_inputs(run, config, InitialWeights(model, adapter))
    bind_inputs(run, config, InitialWeights(model, adapter))  # unchanged inputs: the run continues
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"train\.run_dir.*other data, model or train\.init_from"):
        bind_inputs(run, config, InitialWeights(model, adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"first")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"train\.run_dir"):
        bind_inputs(run, config, InitialWeights(model, adapter))
