"""Soft prompt vectors: weights that token ids beyond the vocabulary look up. Attention treats them like tokens.

Both id V + j and id V + n + j look up vector j: two objectives that share the vectors use one range each, so that one
backward pass keeps their gradients apart. This is a module around the input embeddings, because under ZeRO-3 a weight is
whole only inside the forward pass of the module that owns it. Cost: one more (T, D) tensor a pass; 2 n D float32 on each rank
while gradients are collected.

V vocabulary, n vectors, D width, T rows.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rec_dist.errors import UserError

SOFT_PROMPT_NAME = "soft_prompt.safetensors"
_KEY = "prompt"
NUM_RANGES = 2


class SoftPromptEmbedding(nn.Module):
    """tokens: the model's input embeddings, V rows. values: (n, D), the initial vectors.

    collects: sum the gradient of each range over the backward passes, for take_gradients.
    """

    def __init__(self, tokens: nn.Module, values: Tensor, *, collects: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        self.prompt = nn.Parameter(values)
        self._vocab_size = int(tokens.num_embeddings)  # type: ignore[arg-type]
        # Gemma scales embeddings after the lookup. The vectors are stored unscaled, like rows of the table.
        self._scale = float(getattr(tokens, "scalar_embed_scale", 1.0))
        self._collects = collects
        self._gradients: Tensor | None = None

    @property
    def weight(self) -> Any:
        """(V, D) of the tokens. transformers and PEFT read it from input embeddings."""
        return self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (..., T) -> (..., T, D)."""
        beyond = ids - self._vocab_size
        rows = F.embedding(beyond.clamp(min=0) % len(self.prompt), self.prompt)
        if self._collects and rows.requires_grad:
            rows.register_hook(partial(self._collect, beyond))  # type: ignore[no-untyped-call]
        embedded = self.tokens(ids.clamp(max=self._vocab_size - 1))
        return torch.where((beyond >= 0)[..., None], (rows * self._scale).to(embedded.dtype), embedded)

    def _collect(self, beyond: Tensor, gradient: Tensor) -> None:
        if self._gradients is None:
            self._gradients = gradient.new_zeros(NUM_RANGES * self.num_vectors, gradient.shape[-1], dtype=torch.float32)
        self._gradients.index_add_(0, beyond.clamp(min=0).flatten(), gradient.flatten(0, -2).float())

    @property
    def num_vectors(self) -> int:
        """n, also where ZeRO-3 has sharded the vectors."""
        return int(getattr(self.prompt, "ds_shape", self.prompt.shape)[0])

    def take_gradients(self) -> Tensor:
        """(2, n, D) float64: the gradient of each range since the last call, on this rank."""
        shape = (NUM_RANGES, *getattr(self.prompt, "ds_shape", self.prompt.shape))
        taken, self._gradients = self._gradients, None
        return torch.zeros(shape, dtype=torch.float64) if taken is None else taken.double().view(shape)


def add_soft_prompt(model: Any, values: Tensor, *, collects: bool = False, float32: bool = False) -> SoftPromptEmbedding:
    """Adds n = len(values) vectors beyond the vocabulary of a causal language model, which then takes ids up to V + 2 n - 1.

    float32: they are float32 also where the model is not.
    """
    dtype = torch.float32 if float32 else model.get_input_embeddings().weight.dtype
    embedding = SoftPromptEmbedding(model.get_input_embeddings(), values.to(dtype), collects=collects)
    model.set_input_embeddings(embedding)
    return embedding


def token_rows(model: Any, path: Path, ids: list[int]) -> Tensor:
    """(n, D) float32: the input embeddings of `ids`, read from the folder `path`, because under ZeRO-3 the model holds only a
    part."""
    weight = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            # In a file saved from a model without a head, the name lacks its first part.
            key = next((key for key in tensors.keys() if key == name or name.endswith("." + key)), None)  # noqa: SIM118
            if key is not None:
                rows = tensors.get_slice(key)
                return torch.cat([rows[token : token + 1] for token in ids]).float()
    raise UserError(
        f"model.path ({path}) has no {name} in its *.safetensors, from which soft prompts start; save the model again"
    )


def save_soft_prompt(values: Tensor, folder: Path) -> None:
    """Writes the vectors (n, D) into `folder` and reads them back."""
    save_file({_KEY: values.contiguous()}, folder / SOFT_PROMPT_NAME)
    assert torch.equal(load_soft_prompt(folder), values), folder


def load_soft_prompt(folder: Path) -> Tensor:
    """(n, D) as save_soft_prompt wrote them."""
    return load_file(folder / SOFT_PROMPT_NAME)[_KEY]
