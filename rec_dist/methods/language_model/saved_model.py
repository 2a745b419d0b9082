"""Writes model/ of a finished language-model run: adapter, soft prompts or whole model, and the tokenizer.

A run on interactions also leaves its prompt builder and catalogue. Written weights are read back and compared.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.dataset.schema import ITEMS_NAME
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.models.assemble import ModelSpec
from rec_dist.models.hub import snapshot_of
from rec_dist.models.language import ADAPTER_WEIGHTS
from rec_dist.models.scorer import POLICY_ADAPTER
from rec_dist.models.soft_prompt import SOFT_PROMPT_NAME, save_soft_prompt
from rec_dist.storage.files import sampled_fingerprint, write_json

_TOKENIZER_FILES = ("tokenizer", "special_tokens", "vocab", "merges", "chat_template", "added_")
BASE_NAME = "base.json"  # names the model that the adapter or soft prompts beside it belong to


def save_run_model(
    weights: dict[str, Tensor], module: nn.Module, spec: ModelSpec, builder: PromptBuilder, data: PreparedData, folder: Path
) -> None:
    """Writes everything that evaluation needs. weights: as in save_weights()."""
    save_weights(weights, module, spec, folder)
    builder.save(folder)
    data.copy_items(folder / ITEMS_NAME)


def save_weights(weights: dict[str, Tensor], module: nn.Module, spec: ModelSpec, folder: Path) -> None:
    """Writes everything but prompt and catalogue. weights: whole trained tensors, named as in the scorer `module`."""
    named = {name.removeprefix("model."): value for name, value in weights.items()}
    assert named, "no trainable weights were gathered: an empty adapter would be saved"
    if spec.soft_prompt is not None and spec.soft_prompt.trains:
        (values,) = named.values()
        save_soft_prompt(values, folder)
    elif spec.adapter is not None:
        named = {name.replace(f".{POLICY_ADAPTER}.", "."): value for name, value in named.items()}
        _save_adapter_config(module, spec.path, folder)
        _save(named, folder / ADAPTER_WEIGHTS)
        if spec.soft_prompt is not None:
            assert spec.soft_prompt.start is not None
            shutil.copyfile(spec.soft_prompt.start / SOFT_PROMPT_NAME, folder / SOFT_PROMPT_NAME)
    else:
        module.model.config.save_pretrained(str(folder))  # type: ignore[union-attr,operator]
        _save(named, folder / "model.safetensors")
    if spec.adapter is not None or spec.soft_prompt is not None:
        base = {"path": str(spec.path), "fingerprint": sampled_fingerprint(spec.path, "*.safetensors")}
        write_json(folder / BASE_NAME, base)
    for source in spec.path.iterdir():  # the tokenizer's files differ between models
        own_code = spec.trust_remote_code and source.suffix == ".py"  # which config.json or the tokenizer's files may name
        if source.is_file() and (own_code or source.name.startswith(_TOKENIZER_FILES)):
            shutil.copyfile(source, folder / source.name)


def _save_adapter_config(module: nn.Module, base: Path, folder: Path) -> None:
    """Names the base model by its Hub id and commit if it is from there, so that PEFT finds it on every machine."""
    config = module.model.peft_config[POLICY_ADAPTER]  # type: ignore[union-attr,index]
    snapshot = snapshot_of(base)
    if snapshot is not None:
        config.base_model_name_or_path, config.revision = snapshot  # type: ignore[union-attr]
    config.save_pretrained(str(folder))  # type: ignore[union-attr]


def _save(named: dict[str, Tensor], path: Path) -> None:
    save_file(named, path, metadata={"format": "pt"})
    read_back = load_file(path)
    assert set(read_back) == set(named) and all(torch.equal(read_back[name], named[name]) for name in named), path
