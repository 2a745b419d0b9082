"""Builds the model of a run: the causal language model, soft prompt vectors, an adapter, and which parameters train."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rec_dist.errors import UserError
from rec_dist.models.fused_layers import notes_on_layers
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

    attention, fused_layers, device, trust_remote_code: as in models.language.load_language_model.
    """

    path: Path
    dtype: torch.dtype
    device: str
    attention: str
    activation_checkpointing: bool
    adapter: LoraSpec | None
    initial_adapter: Path | None
    keep_reference: bool
    seed: int
    soft_prompt: SoftPromptSpec | None = None
    fused_layers: str = "auto"
    trust_remote_code: bool = False

    def notes(self) -> list[str]:
        """Lines for the log on how the model runs."""
        return notes_on_layers(self.fused_layers, self.device)

    @property
    def trains_float32(self) -> bool:
        """As trains_float32()."""
        some = self.adapter is not None or (self.soft_prompt is not None and self.soft_prompt.trains)
        return trains_float32(some, bf16=self.dtype != torch.float32, on_gpu=self.device.startswith("cuda"))


def trains_float32(adapted: bool, *, bf16: bool, on_gpu: bool) -> bool:
    """Whether an adapter or soft prompts are float32 on a bfloat16 model. adapted: they train, and not the whole model.

    On CPUs they are: their gradients then sum up in float32 over the micro-batches of a step, at any ZeRO stage, and there is no
    second copy of them. On GPUs they have the model's dtype, and DeepSpeed keeps a float32 copy; so have weights of a model that
    trains whole, everywhere.
    """
    return adapted and bf16 and not on_gpu


def build_model(spec: ModelSpec) -> nn.Module:
    """Builds the model. Call it inside the engine's sharded loading. An adapter or trained vectors alone require gradients."""
    model = load_language_model(
        spec.path,
        dtype=spec.dtype,
        activation_checkpointing=spec.activation_checkpointing,
        attention=spec.attention,
        fused_layers=spec.fused_layers,
        device=spec.device,
        trust_remote_code=spec.trust_remote_code,
    )
    if spec.soft_prompt is not None:
        _add_soft_prompt(model, spec.soft_prompt, spec.path, float32=spec.trains_float32 and spec.soft_prompt.trains)
    if spec.adapter is not None:
        model = add_lora(
            model,
            spec.adapter,
            seed=spec.seed,
            weights=spec.initial_adapter,
            keep_reference=spec.keep_reference,
            float32=spec.trains_float32,
        )
    return model


def _add_soft_prompt(model: nn.Module, spec: SoftPromptSpec, path: Path, *, float32: bool) -> None:
    if spec.start is None:
        values = token_rows(model, path, list(spec.init_tokens))
    else:
        values = load_soft_prompt(spec.start)
        if len(values) != spec.num:
            raise UserError(
                f"prompt.num_virtual ({spec.num}) differs from the {len(values)} vectors in {spec.start}; set it to {len(values)}"
            )
    embedding = add_soft_prompt(model, values, collects=spec.trains, float32=float32)
    if spec.trains:
        model.requires_grad_(False)
    embedding.prompt.requires_grad_(spec.trains)
