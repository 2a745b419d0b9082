"""Models of others: their Python does not run, nobody is asked on standard input, and nothing is unpickled."""

import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rec_dist.config.load import load_config
from rec_dist.data.prompts.tokens import load_tokenizer
from rec_dist.errors import UserError
from rec_dist.models.architecture import count_parameters
from rec_dist.models.language import load_language_model
from rec_dist.models.merge import write_merged_model
from rec_dist.runtime.messages import messages_to

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

(Path(MARKER)).write_text("ran")


class Config(LlamaConfig):
    model_type = "of-somebody"


class Model(LlamaForCausalLM):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


class _Closed(io.StringIO):
    """A standard input that nobody may read."""

    def readline(self, *_: Any) -> str:
        raise AssertionError("asked on standard input")

    read = readline


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def with_code(tiny_model_dir: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model as a class of its own in a file beside it, for config, model and tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "somebody.py").write_text(CODE.replace("MARKER", repr(str(marker))))
    _change(folder / "config.json", model_type="of-somebody", auto_map=_auto(AutoConfig="Config", AutoModelForCausalLM="Model"))
    _change(
        folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map={"AutoTokenizer": [None, "somebody.Tokenizer"]}
    )
    monkeypatch.setattr(sys, "stdin", _Closed())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def _auto(**classes: str) -> dict[str, str]:
    return {name: f"somebody.{value}" for name, value in classes.items()}


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def loaders(folder: Path, *, trusted: bool) -> dict[str, Callable[[], object]]:
    return {
        "tokenizer": lambda: load_tokenizer(folder, trust_remote_code=trusted),
        "count": lambda: count_parameters(folder, None, trust_remote_code=trusted),
        "model": lambda: load_language_model(folder, dtype=torch.float32, trust_remote_code=trusted),
        "merge": lambda: write_merged_model(folder, None, None, folder.parent / "merged", trust_remote_code=trusted),
    }


@pytest.mark.parametrize("kind", ["tokenizer", "count", "model", "merge"])
def test_code_of_a_model_runs_only_where_the_key_says_so(kind: str, with_code: Path, marker: Path) -> None:
    with pytest.raises(UserError, match=r"code.*set model.trust_remote_code=true"):
        loaders(with_code, trusted=False)[kind]()
    assert not marker.exists()
    if kind != "merge":  # it saves a copy of the code, which needs a module that can be found again
        loaders(with_code, trusted=True)[kind]()
        assert marker.read_text() == "ran"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("kind", ["count", "model", "merge"])
def test_a_kernel_of_the_hub_is_code_too(kind: str, key: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    _change(folder / "config.json", text_config={key: "somebody/kernel"})
    with pytest.raises(UserError, match=rf"{key}=.*somebody/kernel.*set model.trust_remote_code=true"):
        loaders(folder, trusted=False)[kind]()


class _Runs:
    """Unpickling it writes the marker."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._marker, "ran")


@pytest.mark.parametrize("kind", ["model", "merge"])
def test_weights_are_never_unpickled(kind: str, tiny_model_dir: Path, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(marker)))
    with pytest.raises(UserError, match=r"safetensors"):
        loaders(folder, trusted=False)[kind]()
    assert not marker.exists()


def test_a_trusted_model_is_told(tiny_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    from rec_dist.methods.registry import find_initial_weights

    lines: list[str] = []
    with messages_to(lines.append):
        for trusted in (False, True):
            find_initial_weights(load_config(tiny_config(tmp_path / "run", {"model.trust_remote_code": trusted})))
    (line,) = lines
    assert line.startswith("WARNING: model.trust_remote_code is true: code of ")
