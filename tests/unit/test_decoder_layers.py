"""The decoder layers are found in every family, also behind an adapter and in the modules that an engine runs."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from rec_dist.models.encoder import Encoder
from rec_dist.models.language import LoraSpec, add_lora
from rec_dist.models.layers import decoder_layers, require_gradients_of_inputs

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}


def model_of(family: str) -> Any:
    """A model of three layers."""
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40))
    config: Any = getattr(transformers, f"{family}Config")
    sizes = SIZES | ({"num_local_experts": 3} if family == "Mixtral" else {}) | ({"head_dim": 8} if "Gemma" in family else {})
    return getattr(transformers, f"{family}ForCausalLM")(config(num_hidden_layers=3, pad_token_id=0, **sizes))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("Llama", "LlamaDecoderLayer"),
        ("Qwen2", "Qwen2DecoderLayer"),
        ("Mistral", "MistralDecoderLayer"),
        ("Gemma2", "Gemma2DecoderLayer"),
        ("Mixtral", "MixtralDecoderLayer"),  # with as many experts as layers
        ("gpt2", "GPT2Block"),
    ],
)
def test_layers_of_a_family(family: str, name: str) -> None:
    assert [type(layer).__name__ for layer in decoder_layers(model_of(family))] == [name] * 3


def test_layers_behind_an_adapter_and_in_an_encoder() -> None:
    model = model_of("Llama")
    layers = list(model.model.layers)
    wrapped = add_lora(model, LoraSpec(2, 4.0, 0.0, "all-linear"), seed=0, weights=None, keep_reference=False)
    assert decoder_layers(Encoder(wrapped)) == layers


def test_other_modules_have_none() -> None:
    assert decoder_layers(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))) == []


def test_the_input_of_the_first_layer_requires_gradients() -> None:
    model = model_of("Llama").requires_grad_(False)
    ids = torch.arange(5)[None]
    assert not model.model(ids).last_hidden_state.requires_grad
    require_gradients_of_inputs(model)
    assert model.model(ids).last_hidden_state.requires_grad
    with torch.no_grad():
        assert not model.model(ids).last_hidden_state.requires_grad
