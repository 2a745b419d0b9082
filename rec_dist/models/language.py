"""Loads a causal language model and adds a LoRA adapter. Takes plain values, returns a module, and knows no method."""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rec_dist.errors import TRAIN_AGAIN, UserError, one_line
from rec_dist.models.attention import check_architecture
from rec_dist.models.attention_paths import choose_attention
from rec_dist.models.flex import FLEX, allow_compilations
from rec_dist.models.foreign_code import way_out
from rec_dist.models.fused_layers import fuse_layers, wants_fused
from rec_dist.models.fused_lora import fuse_lora
from rec_dist.models.hub import weight_shapes
from rec_dist.models.per_prompt import register
from rec_dist.models.scorer import POLICY_ADAPTER, REFERENCE_ADAPTER
from rec_dist.models.shape import read_config

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSpec:
    """LoRA of rank r on `target_modules` (as PEFT names them), scaled by alpha / rank."""

    rank: int
    alpha: float
    dropout: float
    target_modules: str | list[str]


def load_language_model(
    path: Path,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool = False,
    attention: str = "auto",
    fused_layers: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """The causal language model in a Hugging Face folder, without dropout and ready for the masks of packed batches.

    attention: as in models.attention_paths.choose_attention. fused_layers: as in models.fused_layers.wants_fused. device: where
    the engine will run the model. trust_remote_code: model.trust_remote_code. Under an active HfDeepSpeedConfig of stage 3 the
    model is loaded sharded. Raises UserError for a model that cannot be used.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(path, trust_remote_code=trust_remote_code)
    for name, value in config.to_dict().items():  # with dropout a log-prob would depend on the rest of its batch
        if name.endswith(("dropout", "_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    chosen = choose_attention(attention, config, device=device)
    fused = wants_fused(fused_layers, config, device=device)
    if chosen == FLEX:
        allow_compilations()
    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            attn_implementation=chosen,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as fault:
        raise UserError(f"model.path ({path}) is no usable causal language model: {one_line(fault)}{way_out(fault)}") from fault
    check_architecture(model)
    if fused:
        fuse_layers(model)
    if activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its older name
        enable({"use_reentrant": False})
    result: nn.Module = model
    return result


def add_lora(
    model: nn.Module,
    spec: LoraSpec,
    *,
    seed: int,
    weights: Path | None,
    keep_reference: bool,
    float32: bool = False,
) -> nn.Module:
    """Wraps `model` with a LoRA adapter, new or from the adapter folder `weights` of another run.

    keep_reference: also add a frozen copy of `weights` as the adapter "reference". `seed` gives every rank the same initial
    values. float32: adapters are float32 also where the model is not. Raises UserError for modules that cannot be adapted, and if
    the adapter in `weights` has another shape.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    outer = {id(model.get_output_embeddings()): "head", id(model.get_input_embeddings()): "input embedding"}  # type: ignore[operator]
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about targets that are refused below
            wrapped: Any = get_peft_model(model, config, adapter_name=POLICY_ADAPTER, autocast_adapter_dtype=float32)
    except (ValueError, TypeError, re.error) as fault:
        raise UserError(
            f"adapter.target_modules ({spec.target_modules}): {one_line(fault)}; set it to all-linear, or name linear layers of the "
            "model's decoder"
        ) from fault
    _check_adapted(wrapped, spec, outer)
    if weights is not None:
        load_adapter(wrapped, weights, POLICY_ADAPTER)
        if keep_reference:
            wrapped.add_adapter(REFERENCE_ADAPTER, config, autocast_adapter_dtype=float32)
            load_adapter(wrapped, weights, REFERENCE_ADAPTER)
            for name, parameter in wrapped.named_parameters():
                if f".{REFERENCE_ADAPTER}." in name:
                    parameter.requires_grad_(False)
    fuse_lora(wrapped)
    result: nn.Module = wrapped
    return result


def _check_adapted(wrapped: Any, spec: LoraSpec, outer: dict[int, str]) -> None:
    """Raises UserError unless LoRA is on linear layers of the decoder alone. outer: id of another module -> what it is.

    The head multiplies with its weight by itself (models/head.py), and where it is tied to the embedding an adapter of one would
    be missing in the other.
    """
    from peft.tuners.lora import Linear, LoraLayer

    adapted = {name: layer for name, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in adapted.items():
        what = outer.get(id(layer.get_base_layer()))
        if what is None and not isinstance(layer, Linear):
            what = type(layer.get_base_layer()).__name__
        if what is not None:
            raise UserError(
                f"adapter.target_modules ({spec.target_modules}) takes in {name.removeprefix('base_model.model.')}, the model's "
                f"{what}, and LoRA trains linear layers of the decoder; leave it out, or set adapter.kind=none to train all weights"
            )
    if not adapted:
        raise UserError(f"adapter.target_modules ({spec.target_modules}) names no module of this model; set it to all-linear")


def load_adapter(wrapped: nn.Module, folder: Path, name: str) -> None:
    """Copies the adapter weights in `folder` into the adapter `name`.

    Raises UserError, and copies nothing, if they do not fit.
    """
    check_adapter_fits(wrapped, folder, name)
    saved = load_file(folder / ADAPTER_WEIGHTS)
    with torch.no_grad():
        for key, value in _weights_of(wrapped, name).items():
            value.copy_(saved[key])


def check_adapter_fits(wrapped: nn.Module, folder: Path, name: str = POLICY_ADAPTER) -> None:
    """Raises UserError if the adapter weights in `folder` are not those of the adapter `name`. Reads their header alone."""
    scale = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"]
    if scale != wrapped.peft_config[name].lora_alpha:  # type: ignore[union-attr,index]
        raise UserError(
            f"train.init_from: the adapter in {folder} was trained with adapter.alpha={scale}; give this run the same"
        )
    if weight_shapes(folder / ADAPTER_WEIGHTS, TRAIN_AGAIN) != {
        key: tuple(value.shape) for key, value in _weights_of(wrapped, name).items()
    }:
        raise UserError(
            f"train.init_from: the adapter in {folder} does not fit this one (other adapter.rank, adapter.target_modules or "
            "model.path); give both runs the same adapter section"
        )


def _weights_of(wrapped: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The weights of the adapter `name`, by the names under which they are saved."""
    return {key.replace(f".{name}.", "."): value for key, value in wrapped.named_parameters() if f".{name}." in key}
