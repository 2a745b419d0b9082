"""The counts of known decoders are those of the module trees that transformers and PEFT build, number for number."""

import json
from pathlib import Path
from typing import Any

import pytest

from rec_dist.models.architecture import count_built, count_parameters, read_architecture
from rec_dist.models.known_decoders import count_known, is_known
from rec_dist.models.language import LoraSpec

MODELS = Path(__file__).resolve().parents[2] / "configs" / "plan" / "models"
SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, wide heads": {"model_type": "llama", "head_dim": 10},
    "llama, a head for each key": {"model_type": "llama", "num_key_value_heads": None},
    "llama 3.1": {"model_type": "llama", "rope_theta": 5e5, "hidden_act": "silu", "mlp_bias": False, "attention_bias": False},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
}
ADAPTERS = {
    "none": None,
    "all-linear": LoraSpec(4, 8.0, 0.0, "all-linear"),
    "two": LoraSpec(3, 8.0, 0.0, ["v_proj", "down_proj"]),
}


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
@pytest.mark.parametrize("name", sorted(CASES))
def test_counts_are_those_of_the_built_model(name: str, adapter: str, tmp_path: Path) -> None:
    config = {key: value for key, value in {**SHAPE, **CASES[name]}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert is_known(config)
    known = count_known(config, read_architecture(tmp_path), ADAPTERS[adapter])
    assert known == count_built(tmp_path, ADAPTERS[adapter]) == count_parameters(tmp_path, ADAPTERS[adapter])


@pytest.mark.parametrize("path", sorted(MODELS.iterdir()), ids=lambda path: path.name)
def test_every_shipped_model_is_known(path: Path) -> None:
    """Otherwise a plan of it takes seconds longer."""
    assert is_known(json.loads((path / "config.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"quantization_config": {}},
        {"rms_norm_eps": "x"},
        {"num_local_experts": 8},
        {"tie_word_embeddings": None},
        {"hidden_size": 25, "head_dim": 4},
        {"num_attention_heads": 0},
    ],
)
def test_what_is_not_known_for_certain_is_built(change: dict[str, Any]) -> None:
    assert not is_known({**SHAPE, "model_type": "llama", **change})


@pytest.mark.parametrize("targets", [".*q_proj", ["self_attn.q_proj"], ["embed_tokens"], []])
def test_an_adapter_that_only_peft_resolves_is_built(targets: Any, tmp_path: Path) -> None:
    config = {**SHAPE, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert count_known(config, read_architecture(tmp_path), LoraSpec(4, 8.0, 0.0, targets)) is None
