"""Builds the model of a run: the causal language model, soft prompt vectors, an adapter, and which parameters train."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rec_dist.errors import UserError
from rec_dist.models.language import LoraSpec, add_lora, load_language_model
from rec_dist.models.soft_prompt import add_soft_prompt, load_soft_prompt, token_rows


@dataclass(frozen=True)
class SoftPromptSpec:
    """n vectors: those in the folder `start`, or if that is None, the embeddings of the n init_tokens.

    trains: only the vectors train, and their gradients are collected by range.
    """

    num: int
    start: Path | None
    init_tokens: tuple[int, ...]
    trains: bool


@dataclass(frozen=True)
class ModelSpec:
    """What the model starts from and how it runs. adapter: None for full fine-tuning. initial_adapter: an adapter folder to
    start from.

    attention, device, trust_remote_code: as in models.language.load_language_model. max_tokens: as in models.scorer.Scorer.
    """

    path: Path
    dtype: torch.dtype
    device: str
    attention: str
    max_tokens: int
    activation_checkpointing: bool
    adapter: LoraSpec | None
    initial_adapter: Path | None
    keep_reference: bool
    seed: int
    soft_prompt: SoftPromptSpec | None = None
    trust_remote_code: bool = False


def build_model(spec: ModelSpec) -> nn.Module:
    """Builds the model. Call it inside the engine's sharded loading. An adapter or trained vectors alone require gradients."""
    model = load_language_model(
        spec.path,
        dtype=spec.dtype,
        activation_checkpointing=spec.activation_checkpointing,
        attention=spec.attention,
        device=spec.device,
        trust_remote_code=spec.trust_remote_code,
    )
    if spec.soft_prompt is not None:
        _add_soft_prompt(model, spec.soft_prompt, spec.path)
    if spec.adapter is not None:
        model = add_lora(model, spec.adapter, seed=spec.seed, weights=spec.initial_adapter, keep_reference=spec.keep_reference)
    return model


def _add_soft_prompt(model: nn.Module, spec: SoftPromptSpec, path: Path) -> None:
    if spec.start is None:
        values = token_rows(model, path, list(spec.init_tokens))
    else:
        values = load_soft_prompt(spec.start)
        if len(values) != spec.num:
            raise UserError(
                f"prompt.num_virtual ({spec.num}) differs from the {len(values)} vectors in {spec.start}; set it to {len(values)}"
            )
    embedding = add_soft_prompt(model, values, collects=spec.trains)
    if spec.trains:
        model.requires_grad_(False)
    embedding.prompt.requires_grad_(spec.trains)
