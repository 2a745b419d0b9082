"""What set-up needs to know of a language model before it is loaded, from its config.json with transformers' defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.errors import UserError, one_line
from rec_dist.models.foreign_code import check_no_kernel, way_out
from rec_dist.runtime.quiet import quieten_loaded


@dataclass(frozen=True)
class ModelShape:
    """Width D, vocabulary V (rows of the embedding), and max_positions: None without a limit."""

    width: int
    max_positions: int | None
    vocab_size: int


def read_shape(folder: Path, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of the model in `folder`. Raises UserError as read_config(), and for a model without a width or a vocabulary."""
    config = read_config(folder, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
    width, vocabulary = getattr(config, "hidden_size", None), getattr(config, "vocab_size", None)
    if not isinstance(width, int) or not isinstance(vocabulary, int):
        raise UserError(
            f"model.path ({folder}): its config.json names no hidden_size or no vocab_size; choose a decoder such as Llama"
        )
    return ModelShape(width, position_limit(config.to_dict()), vocabulary)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of the model in `folder`.

    Raises UserError if config.json cannot be read, names a kernel of the Hub, or describes quantised weights.
    """
    from transformers import AutoConfig

    quieten_loaded()
    check_no_kernel(folder, trusted=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as fault:  # for a damaged file transformers raises most of Python's errors
        raise UserError(f"model.path ({folder}) holds no model that loads: {one_line(fault)}{way_out(fault)}") from fault
    check_not_quantised(config.to_dict(), folder)
    return config


def check_not_quantised(config: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError if the keys of a config.json describe quantised weights."""
    described = config.get("quantization_config")
    if described:
        method = described.get("quant_method", "of an unnamed kind") if isinstance(described, Mapping) else described
        raise UserError(
            f"model.path ({folder}) holds quantised weights ({str(method)[:50]}), which can be neither trained nor sharded nor "
            "merged here; name the folder or Hub id of the unquantised model"
        )


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Positions of the model with these keys of config.json; None if nothing limits them.

    For LongRoPE, the positions before its frequencies change: a longer sequence would change those of its neighbours in a batch.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(rope, Mapping) and "longrope" in (rope.get("rope_type"), rope.get("type")):
        limit = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or limit
    return int(limit) if isinstance(limit, int | float) else None
