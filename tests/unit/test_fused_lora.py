"""LoRA in one pass equals PEFT's: outputs and gradients, each adapter, no adapter, dropout, and where it must not be used."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers

from rec_dist.models.fused_lora import _Fused, fuse_lora

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    ),
    "gpt2": lambda: transformers.GPT2Config(  # its layers keep their weights transposed
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}


def adapted(name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """A model with two adapters whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)
    transposed = name == "gpt2"
    config = LoraConfig(
        r=4, lora_alpha=12, lora_dropout=dropout, target_modules="all-linear", fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config, adapter_name="policy", autocast_adapter_dtype=False)
    model.add_adapter("reference", config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    return model.train()


def both(model: Any) -> tuple[Any, Any]:
    other = copy.deepcopy(model)
    fuse_lora(other)
    return model, other


def outputs_and_gradients(model: Any, adapter: str | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(24).view(2, 12)
    if adapter is not None:
        model.set_adapter(adapter)
    with model.disable_adapter() if adapter is None else nullcontext():
        torch.manual_seed(7)
        logits = model(input_ids=ids).logits
        if adapter is not None:
            logits.float().square().mean().backward()
    return logits.detach(), {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("adapter", ["policy", "reference", None])
def test_the_same_as_peft(name: str, dropout: float, adapter: str | None) -> None:
    plain, fused = both(adapted(name, dropout=dropout))
    (wanted, gradients), (got, own) = (outputs_and_gradients(model, adapter) for model in (plain, fused))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert own.keys() == gradients.keys()
    assert bool(own) == (adapter is not None)
    for key, gradient in gradients.items():
        torch.testing.assert_close(own[key], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max() + 1), msg=key)


def test_every_layer_runs_this_way_and_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = both(adapted("llama"))
    assert list(plain.state_dict()) == list(fused.state_dict())
    calls = []
    inner = _Fused.forward
    monkeypatch.setattr(_Fused, "forward", staticmethod(lambda *args, **more: calls.append(1) or inner(*args, **more)))
    fused(input_ids=torch.arange(12).view(1, 12))
    assert len(calls) == 2 * 7, "q, k, v, o, gate, up and down of two layers"


def test_a_float32_adapter_on_a_bfloat16_model_multiplies_in_bfloat16_and_has_float32_gradients() -> None:
    model = adapted("llama", dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
    plain, fused = both(model)
    alike = copy.deepcopy(model)  # the whole adapter in bfloat16, in the same three products
    for key, parameter in alike.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.bfloat16()
    fuse_lora(alike)
    (wanted, _), (got, own), (rounded, gradients) = (outputs_and_gradients(each, "policy") for each in (plain, fused, alike))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rounded)
    assert float((got - wanted).float().norm()) <= 0.03 * float(wanted.float().norm()), "PEFT multiplies in float32"
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert own[key].dtype == torch.float32
        assert torch.equal(own[key], gradient.float()), key
