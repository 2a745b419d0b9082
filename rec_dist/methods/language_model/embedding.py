"""P2Rec's stage 2, information augmentation: the model's state after a prompt whose history is one item, for every item.

Items in catalogue order fill micro-batches of at most train.max_tokens_per_micro_batch tokens. A fixed number of micro-batches is
a part, which is written when it is done. Only the catalogue and the budget decide which items share a micro-batch, so a vector is
the same on any worker and after any number of stops. Cost: a forward pass of the decoder over instruction and title for each
item.

I items, D width.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.embeddings import PartFiles
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.data.prompts.builder import PromptBuilder, check_saved
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.builders import build_builder, model_dtype, model_spec
from rec_dist.methods.language_model.limits import check_positions
from rec_dist.methods.p2rec.config import P2RecConfig
from rec_dist.models.assemble import build_model
from rec_dist.models.encoder import Encoder, check_encoder
from rec_dist.models.shape import read_shape
from rec_dist.packing.pooled_prompts import pack_pooled_prompts
from rec_dist.runtime.arrays import I64
from rec_dist.storage.files import fingerprint

_BATCHES_PER_PART = 8  # at 768 tokens a micro-batch and 400 tokens/s on two cores 15 s of work


@dataclass(frozen=True)
class EmbedJob:
    """What a worker needs to write embeddings into `folder`.

    config: plain values with absolute paths, for workers on other machines. saved: the model folder of a run, whose prompt must
    match; None for a base model.
    """

    config: dict[str, Any]
    folder: str
    initial: InitialWeights
    saved: Path | None

    def parsed(self) -> RunConfig:
        """The configuration, validated again."""
        return RunConfig.model_validate(self.config)


class ItemPrompts:
    """The catalogue as one-item prompts: micro-batches of neighbouring items, parts of neighbouring micro-batches.

    Raises UserError if the prompt is not the saved model's, or is too long for a micro-batch or for the model.
    """

    def __init__(self, job: EmbedJob) -> None:
        config = job.parsed()
        data = open_data(config.data)
        self.builder = build_builder(config, job.initial.model, data)
        if job.saved is not None:
            check_saved(self.builder, job.saved)
        if config.prompt.candidates == "listed":
            raise UserError("prompt.candidates=listed has no effect on embeddings, where nothing is chosen; set it to none")
        self.pooling, self.num_items, self.titles = config.task.section(P2RecConfig).pooling, data.num_items, data.titles
        lengths = prompt_lengths(self.builder)
        shape = read_shape(job.initial.model, trust_remote_code=config.model.trust_remote_code)
        _check(lengths, config.train.max_tokens_per_micro_batch, shape.max_positions, data.titles)
        self.micro_batches = cut(lengths, config.train.max_tokens_per_micro_batch)  # (micro-batches + 1,) where each begins
        self.inputs: dict[str, Any] = {
            "data": data.manifest.fingerprint,
            **job.initial.fingerprints(),
            "prompt": self.builder.fingerprint,
            "pooling": self.pooling,
            "dtype": config.model.dtype,
        }
        self.num_tokens = int(lengths.sum())
        # The key of a part also covers what decides its items and the last bits of its vectors.
        key = fingerprint([self.inputs, config.train.max_tokens_per_micro_batch])
        self.parts = PartFiles(Path(job.folder), key, [*self.micro_batches[:-1:_BATCHES_PER_PART].tolist(), self.num_items])

    def batches_of(self, part: int) -> list[range]:
        """The items of each micro-batch of a part."""
        begins = self.micro_batches[part * _BATCHES_PER_PART : (part + 1) * _BATCHES_PER_PART + 1].tolist()
        return [range(first, stop) for first, stop in pairwise(begins)]


def prompt_lengths(builder: PromptBuilder) -> I64:
    """(I,) tokens of each item's prompt."""
    frame = len(builder.prompt(np.empty(0, dtype=np.int32))) + len(builder.pieces.item_prefix)
    return builder.titles.lengths + frame


def cut(lengths: I64, max_tokens: int) -> I64:
    """Where each micro-batch begins, and the end. A micro-batch takes as many neighbours as fit the budget."""
    begins, used = [0], 0
    for item, length in enumerate(lengths.tolist()):
        if used + length > max_tokens:
            begins.append(item)
            used = 0
        used += length
    return np.asarray([*begins, len(lengths)], dtype=np.int64)


def _check(lengths: I64, max_tokens: int, max_positions: int | None, titles: list[str]) -> None:
    longest, title = int(lengths.max()), titles[int(lengths.argmax())][:60]
    if longest > max_tokens:
        raise UserError(
            f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the prompt of {title!r} ({longest} tokens); "
            "raise it"
        )
    check_positions(longest, max_positions, what=f"the prompt of {title!r}", way_out="shorten its title or prompt.instruction")


class Embedder:
    """Holds the whole model on `device` and writes the parts that it is asked for."""

    def __init__(self, job: EmbedJob, device: str) -> None:
        config = job.parsed()
        job = replace(job, initial=job.initial.on_this_node(code=config.model.trust_remote_code))
        self._prompts, self._device = ItemPrompts(job), device
        spec = model_spec(config, job.initial, self._prompts.builder, device, trains=False)
        encoder = Encoder(build_model(spec))
        self._encoder = encoder.to(device).eval().requires_grad_(False)
        check_encoder(encoder, lambda prompts: encoder(prompts.to(device)).cpu(), dtype=model_dtype(config, device))

    def write(self, part: int) -> None:
        """Embeds the items of a part and writes its file. Raises UserError if a vector is not finite."""
        vectors = [self._embed(items) for items in self._prompts.batches_of(part)]
        table = torch.cat(vectors)
        finite = table.isfinite().all(dim=1)
        if not finite.all():
            item = self._prompts.parts.starts[part] + int(finite.int().argmin())
            raise UserError(
                f"model.path: the state after {self._prompts.titles[item][:60]!r} (item {item}) is not finite; set "
                "model.dtype=float32, or name another model"
            )
        self._prompts.parts.write(part, table.numpy())

    @torch.no_grad()
    def _embed(self, items: range) -> torch.Tensor:
        """One micro-batch: (n, D) float32 on the CPU."""
        builder, pooling = self._prompts.builder, self._prompts.pooling
        prompts = [builder.prompt(np.asarray([item], dtype=np.int32)) for item in items]
        micro_batch = pack_pooled_prompts(prompts, [builder.num_pooled(tokens, pooling) for tokens in prompts])
        vectors: torch.Tensor = self._encoder(micro_batch.to(self._device)).cpu()
        return vectors
