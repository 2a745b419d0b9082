"""Parameters of decoders whose layers are known, counted from config.json alone.

transformers and PEFT count any model (models/architecture.py), but importing them takes two thirds of a plan's time. What is
not known for certain is left to them. Both counts are equal: tests/unit/test_known_decoders.py.

D width, F inner width of the MLP, V vocabulary, r rank of LoRA.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rec_dist.models.language import LoraSpec
from rec_dist.models.size import WeightCount

_QKV_BIAS = {"llama": False, "mistral": False, "qwen2": True}  # by model_type
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder with gated MLPs, from which activations are counted. kv_heads < heads: grouped-query attention."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int | None


@dataclass(frozen=True)
class Parameters:
    """Each parameter once, in the order of the forward pass: its number of elements, and whether it trains.

    head: elements of the output matrix. tied: it is also the input embedding, and counted once. work: the weights that a
    token passes, for FLOPs; None for a mixture of experts. adapted: number of modules with an adapter.
    """

    sizes: tuple[int, ...]
    trains: tuple[bool, ...]
    head: int
    tied: bool
    adapted: int
    work: WeightCount | None

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)

    @property
    def trainable(self) -> int:
        """Elements of the parameters that train."""
        return sum(size for size, trains in zip(self.sizes, self.trains, strict=True) if trains)


def _one_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


_number, _count, _switch = _one_of(int, float), _one_of(int), _one_of(bool)
# Every key that a known config.json may have. Any other key or value might change the layers, or be one that transformers rejects.
_KEYS: dict[str, Callable[[Any], bool]] = {
    "architectures": _one_of(list),
    "attention_bias": lambda value: value is False,
    "attention_dropout": _number,
    "bos_token_id": _one_of(int, type(None)),
    "dtype": _one_of(str, type(None)),
    "eos_token_id": _one_of(int, list, type(None)),
    "head_dim": _one_of(int, type(None)),
    "hidden_act": lambda value: value == "silu",
    "hidden_size": _count,
    "initializer_range": _number,
    "intermediate_size": _count,
    "max_position_embeddings": _count,
    "mlp_bias": lambda value: value is False,
    "model_type": lambda value: value in tuple(_QKV_BIAS),
    "num_attention_heads": _count,
    "num_hidden_layers": _count,
    "num_key_value_heads": _count,
    "pad_token_id": _one_of(int, type(None)),
    "pretraining_tp": lambda value: value == 1,
    "rms_norm_eps": _one_of(float),
    "rope_parameters": _one_of(dict, type(None)),
    "rope_scaling": _one_of(dict, type(None)),
    "rope_theta": _number,
    "tie_word_embeddings": _switch,
    "torch_dtype": _one_of(str),
    "transformers_version": _one_of(str),
    "use_cache": _switch,
    "vocab_size": _count,
}


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the layers of this config.json are known for certain."""
    if "model_type" not in config or not all(key in _KEYS and _KEYS[key](value) for key, value in config.items()):
        return False
    width, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 0)
    return bool(heads > 0 and width % heads == 0)  # transformers rejects others even with a head_dim


def count_known(config: Mapping[str, Any], shape: Architecture, adapter: LoraSpec | None) -> Parameters | None:
    """What building the model of this known config.json, of this shape, would count; None for an adapter that only PEFT resolves."""
    targets = () if adapter is None else _targets(adapter)
    if targets is None:
        return None
    tied, embedding = bool(config.get("tie_word_embeddings", False)), shape.vocabulary * shape.width
    layer = list(_layer(shape, _QKV_BIAS[config["model_type"]], targets, 0 if adapter is None else adapter.rank))
    parts = [("embedding", embedding), *layer * shape.layers, ("norm", shape.width)]
    if not tied:
        parts.append(("head", embedding))
    trains = tuple(adapter is None or kind == "lora" for kind, _ in parts)
    base, lora = (shape.layers * sum(size for kind, size in layer if kind == wanted) for wanted in ("matrix", "lora"))
    work = WeightCount(0, base, embedding, True) if adapter is None else WeightCount(base, lora, embedding, False)
    return Parameters(tuple(size for _, size in parts), trains, embedding, tied, len(targets) * shape.layers, work)


def _targets(adapter: LoraSpec) -> tuple[str, ...] | None:
    """The modules of a layer that get LoRA; None for what only PEFT can resolve."""
    if adapter.target_modules == "all-linear":
        return _MODULES
    if isinstance(adapter.target_modules, str) or not set(adapter.target_modules) <= set(_MODULES):
        return None
    return tuple(adapter.target_modules) or None


def _layer(shape: Architecture, qkv_bias: bool, targets: tuple[str, ...], rank: int) -> Iterator[tuple[str, int]]:
    """(kind, elements) of a layer's parameters."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = ((shape.width, queries), (shape.width, keys), (shape.width, keys), (queries, shape.width))
    inner = ((shape.width, shape.inner), (shape.width, shape.inner), (shape.inner, shape.width))
    for name, (inputs, outputs) in zip(_MODULES, (*sizes, *inner), strict=True):
        yield "matrix", inputs * outputs
        if qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
            yield "bias", outputs
        if name in targets:
            yield from (("lora", rank * inputs), ("lora", rank * outputs))
    yield from (("norm", shape.width), ("norm", shape.width))
