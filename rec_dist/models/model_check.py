"""Whether a model folder can be used with its adapter, before a worker starts. Reads headers, and no weights.

transformers builds the model and converts its weights on torch's meta device, as in loading, only without storage, and PEFT adds
the adapter. What loading would make up at random (a weight that no file holds) is an error here. Cost: about 10 ms a layer.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rec_dist.errors import UserError, one_line
from rec_dist.models.attention import check_architecture
from rec_dist.models.attention_paths import choose_attention
from rec_dist.models.foreign_code import way_out
from rec_dist.models.hub import weight_files, weight_shapes
from rec_dist.models.language import LoraSpec, add_lora, check_adapter_fits
from rec_dist.models.shape import read_config


def check_model_folder(
    folder: Path, adapter: LoraSpec | None, *, saved_adapter: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Raises UserError for a model that cannot be used, and for an adapter that cannot be trained, merged or loaded on it.

    saved_adapter: the adapter folder of another run, which must fit. A model with Python code of its own is only looked at as far
    as its files go.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    weights = weights_without_storage(folder)
    model = _skeleton(folder, config, weights)
    if model is None:
        return
    check_architecture(model)
    if adapter is not None:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # add_lora seeds the generator
            model = add_lora(model, adapter, seed=0, weights=None, keep_reference=False)
        if saved_adapter is not None:
            check_adapter_fits(model, saved_adapter)


def weights_without_storage(folder: Path) -> dict[str, Tensor]:
    """The names and shapes of the weights in a model folder. Raises UserError if a file is missing, cut short or damaged."""
    weights: dict[str, Tensor] = {}
    for name in weight_files(folder):
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"model.path ({folder}) lacks {name}, which holds a part of its weights; fetch or save the model again"
            )
        shapes = weight_shapes(path, "fetch or save the model again", key="model.path: ")
        weights |= {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return weights


def _skeleton(folder: Path, config: Any, weights: dict[str, Tensor]) -> Any:
    """The model on the meta device, with `weights` loaded; None for a class that is not transformers' own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "auto_map", None):
        return None
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(kind, list | tuple):
        kind = next((one for one in kind if one.__name__ in (config.architectures or ())), kind[0])
    if kind is None:
        raise UserError(
            f"model.path ({folder}) is no usable causal language model: transformers has none of type "
            f"{config.model_type}; choose a decoder such as Llama, Qwen, Gemma or GPT-2"
        )
    try:
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            device_map={"": "meta"},
            dtype=torch.float32,
            attn_implementation=choose_attention("sdpa", config, device="cpu"),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as fault:  # for a shape that is none, transformers and torch raise most of Python's errors
        raise UserError(f"model.path ({folder}) is no usable causal language model: {one_line(fault)}{way_out(fault)}") from fault
    _check_complete(folder, info)
    skeleton: nn.Module = model
    return skeleton


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Raises UserError if loading would draw weights at random. info: transformers' own."""
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model.path ({folder}): its *.safetensors lack {len(missing)} weight{'s' if len(missing) > 1 else ''} of the model "
            f"in its config.json, such as {missing[0]}, which would be drawn at random; fetch or save the model again"
        )
    if others := sorted(info["mismatched_keys"]):
        name, found, wanted = others[0]
        raise UserError(
            f"model.path ({folder}): {name} has the shape {tuple(found)} in its *.safetensors and {tuple(wanted)} by its "
            "config.json; take both from the same model"
        )
