"""Retrieval as a task: its parts from a configuration, checked, and what a finished run leaves."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.item_sampler import ItemSampler
from rec_dist.data.sampling.targets import index_targets
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.builders import build_batch_sampler, build_builder, model_spec
from rec_dist.methods.language_model.limits import check_evaluation
from rec_dist.methods.language_model.saved_model import save_run_model
from rec_dist.methods.retrieval.config import RetrievalConfig
from rec_dist.methods.retrieval.examples import RetrievalExamples, TitlePrompts
from rec_dist.methods.retrieval.head import METRIC_NAMES, RetrievalHead
from rec_dist.methods.retrieval.item_vectors import ItemVectors
from rec_dist.methods.retrieval.saved_model import save_retrieval
from rec_dist.methods.task import Passes, Score, Task, TaskModel
from rec_dist.models.assemble import ModelSpec, build_model
from rec_dist.models.encoder import Encoder, check_encoder
from rec_dist.models.shape import read_shape
from rec_dist.storage.files import fingerprint, sha256


def build_retrieval_task(config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
    """The task on `split` of data.path. Raises UserError for anything that would fail later."""
    check_settings(config)
    _check_whole_model(config, initial.model)
    settings, train = config.task.section(RetrievalConfig), config.train
    data = open_data(config.data)
    rows = data.split(split)
    builder = build_builder(config, initial.model, data)
    shape = read_shape(initial.model, trust_remote_code=config.model.trust_remote_code)
    _check_width(settings.width, shape.width, data.num_items)
    sampled = 0 < settings.num_sampled < data.num_items
    examples = RetrievalExamples(
        data,
        rows,
        index_targets(rows, train.targets_per_prompt),
        TitlePrompts(builder, settings.pooling),
        ItemSampler(settings.num_sampled, train.seed, data.train_counts) if sampled else None,
    )
    sampler = build_batch_sampler(config, max(len(examples.targets), 1))
    examples.check(sampler, max_tokens=train.max_tokens_per_micro_batch, max_positions=shape.max_positions)
    check_evaluation(config, builder, data, answered=False)
    spec = model_spec(config, initial, None, device, trains=True)
    items = item_vectors(settings, data, initial, builder, dtype=str(spec.dtype))
    items.check(max_tokens=train.max_tokens_per_micro_batch)
    return retrieval_task(settings, spec, examples, items, sampler=sampler, width=shape.width)


def check_settings(config: RunConfig) -> None:
    """Raises UserError for a setting that cannot work, or that has no effect."""
    faults = {
        "adapter.kind=soft_prompt trains under task.kind=delrec_distill, not retrieval; set adapter.kind=lora": (
            config.adapter.kind == "soft_prompt"
        ),
        "prompt.candidates=listed has no effect on task.kind=retrieval, where nothing is chosen from a list; set it to none": (
            config.prompt.candidates == "listed"
        ),
        "prompt.style=chat has no effect on task.kind=retrieval, whose prompts end with a title; set prompt.style=list": (
            config.prompt.style == "chat"
        ),
        f"prompt.num_virtual ({config.prompt.num_virtual}) has no effect on task.kind=retrieval; set it to 0": (
            config.prompt.num_virtual > 0
        ),
    }
    for fault, found in faults.items():
        if found:
            raise UserError(fault)


def _check_whole_model(config: RunConfig, model: Path) -> None:
    """Raises UserError for full fine-tuning of a model whose head has weights of its own, which would get no gradient."""
    if config.adapter.kind != "none":
        return
    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if not shape.get("tie_word_embeddings", shape.get("text_config", {}).get("tie_word_embeddings", True)):
        raise UserError(
            "adapter.kind=none: the head of this model is not tied to its embedding, and retrieval does not train it; set "
            "adapter.kind=lora"
        )


def _check_width(width: int, source: int, num_items: int) -> None:
    if width > (most := min(source, num_items - 1)):
        raise UserError(
            f"task.retrieval.width ({width}) is more than the {most} directions that {num_items} states of width {source} can "
            "have; lower it"
        )


def item_vectors(
    settings: RetrievalConfig, data: PreparedData, initial: InitialWeights, builder: PromptBuilder, *, dtype: str
) -> ItemVectors:
    """The vectors of the catalogue under the model that the run starts from. dtype: of its states."""
    model = [initial.fingerprints(), sha256(initial.model / "config.json")]  # positions and windows stand in the latter
    key = fingerprint([data.manifest.fingerprint, model, builder.fingerprint, settings.pooling, dtype])
    return ItemVectors(data, TitlePrompts(builder, settings.pooling), key, settings.width)


def retrieval_task(
    settings: RetrievalConfig,
    spec: ModelSpec,
    examples: RetrievalExamples,
    items: ItemVectors,
    *,
    sampler: GlobalBatchSampler,
    width: int,
) -> Task:
    """Train the model of `spec`, of `width`, on `examples`. Call examples.check() and items.check() first."""

    def build() -> nn.Module:
        encoder = Encoder(build_model(spec))
        return RetrievalHead(
            encoder,
            settings.width,
            temperature=settings.temperature,
            learns_terms=settings.terms,
            learns_temperature=settings.learn_temperature,
        )

    def check(module: Any, score: Score) -> None:
        check_encoder(module.encoder, score, dtype=spec.dtype)

    def first_pass(passes: Passes) -> None:
        assert isinstance(passes.module, RetrievalHead)
        passes.module.table = items.compute(passes).on(passes.world.device)
        if settings.refresh_every:
            passes.module.table.changing_buffers = ("vectors",)

    def after_step(passes: Passes, step: int) -> None:
        if settings.refresh_every and step % settings.refresh_every == 0:
            assert isinstance(passes.module, RetrievalHead) and passes.module.table is not None
            items.refresh(passes, passes.module.table)

    def save(weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        assert isinstance(module, RetrievalHead)
        model = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
        own = {name: value for name, value in weights.items() if not name.startswith("encoder.")}
        save_run_model(model, module.encoder, spec, items.prompts.builder, examples.prepared, folder)
        save_retrieval(module, own, settings.pooling, examples.prepared, folder)

    return Task(
        name="retrieval",
        sampler=sampler,
        data=examples,
        model=TaskModel(build, spec.dtype, width, METRIC_NAMES, check=check, spec=spec),
        save=save,
        first_pass=first_pass,
        after_step=after_step,
        notes=lambda: _notes(settings, examples, sampler),
    )


def _notes(settings: RetrievalConfig, examples: RetrievalExamples, sampler: GlobalBatchSampler) -> list[str]:
    """Which softmax trains, and whether the data fits the cache."""
    notes = examples.prepared.cache_notes(examples.split.name, sampler.window)
    num_items = examples.prepared.num_items
    if examples.negatives is not None:
        notes.append(f"the loss is an estimate from {settings.num_sampled:,} sampled items of {num_items:,}, lower on average")
    elif settings.num_sampled:
        notes.append(f"task.retrieval.num_sampled ({settings.num_sampled:,}) covers the catalogue: the softmax is the full one")
    return notes
