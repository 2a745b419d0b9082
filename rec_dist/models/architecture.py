"""A language model's shape from its config.json, and its parameters. Reads no weights.

The counts are exact: those of known decoders follow from the shape, and for all others transformers builds the module tree and
PEFT the adapter on torch's meta device, as in training, only without storage. That costs imports of 2 to 3 s, then about 10 ms
a layer.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rec_dist.errors import UserError, one_line
from rec_dist.models.foreign_code import check_no_kernel, way_out
from rec_dist.models.known_decoders import Architecture, Parameters, count_known, is_known
from rec_dist.models.language import LoraSpec, add_lora
from rec_dist.models.layers import decoder_layers
from rec_dist.models.scorer import Scorer
from rec_dist.models.shape import check_not_quantised, position_limit
from rec_dist.models.size import count_weights
from rec_dist.models.soft_prompt import add_soft_prompt
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist.runtime.quiet import quieten_loaded

_NEEDED = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_WAY_OUT = "give the config.json of a decoder such as Llama"
_LIMITS = {  # larger than any published model; 1,000 layers take 10 s
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 31,
    "max_position_embeddings": 1 << 40,
}


def read_architecture(folder: Path) -> Architecture:
    """The shape in folder/config.json. Raises UserError if there is none, or if a number is missing or out of range."""
    path = folder / "config.json"
    return _shape(_read(path), path)


def _shape(config: dict[str, Any], path: Path) -> Architecture:
    missing = [key for key in _NEEDED if not config.get(key)]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}, which a plan needs; {_WAY_OUT}")
    for key, limit in _LIMITS.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= limit):
            raise UserError(f"{path}: {key} ({str(value)[:50]}) is not a whole number from 1 to {limit}; {_WAY_OUT}")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim") is None and width % heads:
        raise UserError(
            f"{path}: hidden_size ({width}) is not a multiple of num_attention_heads ({heads}), and there is no head_dim; "
            f"{_WAY_OUT}"
        )
    return Architecture(
        width=width,
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        vocabulary=config["vocab_size"],
        max_positions=position_limit(config),
    )


def _read(path: Path) -> dict[str, Any]:
    """The keys of a config.json, and beside them those of its text_config."""
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no config.json; give a Hugging Face model folder, or a folder such as "
            "configs/plan/models/llama3-8b"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = {**config, **config.get("text_config", {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as fault:
        raise UserError(f"{path} is not a readable JSON object: {fault}; {_WAY_OUT}") from fault
    check_not_quantised(config, path.parent)
    return config


def count_parameters(
    folder: Path, adapter: LoraSpec | None, *, num_virtual: int = 0, trust_remote_code: bool = False
) -> Parameters:
    """The parameters of the model of folder/config.json, with the adapter if there is one.

    num_virtual: soft prompt vectors, which then train alone. trust_remote_code: model.trust_remote_code. Raises UserError as
    training does.
    """
    path = folder / "config.json"
    config = _read(path)
    known = count_known(config, _shape(config, path), adapter) if is_known(config) and not num_virtual else None
    return known or count_built(folder, adapter, num_virtual=num_virtual, trust_remote_code=trust_remote_code)


def count_built(folder: Path, adapter: LoraSpec | None, *, num_virtual: int = 0, trust_remote_code: bool = False) -> Parameters:
    """As count_parameters, for any model: builds it without storage."""
    from transformers import AutoConfig, AutoModelForCausalLM

    quieten_loaded()
    check_no_kernel(folder, trusted=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as fault:  # for a damaged file transformers raises its own errors, torch's and most of Python's
        raise UserError(
            f"{folder} describes no causal language model that transformers can build: {one_line(fault)}"
            f"{way_out(fault) or f'; {_WAY_OUT}'}"
        ) from fault
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{folder} describes a model without a language-model head; choose a decoder such as Llama")
    tied = head.weight is model.get_input_embeddings().weight
    if num_virtual:
        embedding = add_soft_prompt(model, torch.empty(num_virtual, head.weight.shape[1], device="meta"))
        model.requires_grad_(False)
        embedding.prompt.requires_grad_(True)
    if adapter is not None:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # add_lora seeds the generator
            model = add_lora(model, adapter, seed=0, weights=None, keep_reference=False)
    work = count_weights(Scorer(model, _no_loss, ()))
    named = list(model.named_parameters())
    layers = decoder_layers(model)
    layer_of = {id(parameter): number for number, layer in enumerate(layers) for parameter in layer.parameters()}
    return Parameters(
        sizes=tuple(parameter.numel() for _, parameter in named),
        trains=tuple(bool(parameter.requires_grad) for _, parameter in named),
        head=head.weight.numel(),
        tied=tied,
        adapted=sum(".lora_A." in name for name, _ in named),
        work=work,
        layers=tuple(layer_of.get(id(parameter), -1) for _, parameter in named) if layers else (),
    )


def _no_loss(logps: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return logps.sum(), logps.new_zeros(()), {}
