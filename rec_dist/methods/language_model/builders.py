"""The parts of a language-model task, each built from its section of the configuration."""

from pathlib import Path

import numpy as np
import torch

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.hard_negatives import HardNegatives
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prompts.builder import PromptBuilder, build_prompt_builder
from rec_dist.data.prompts.tokens import load_tokenizer
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.negatives import NegativeSampler
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.models.assemble import ModelSpec, SoftPromptSpec
from rec_dist.models.language import LoraSpec
from rec_dist.models.model_check import check_model_folder
from rec_dist.models.shape import read_shape
from rec_dist.runtime.rng import hash_u64

_INIT_TOKENS = 31  # the stream of random draws of this module


def build_batch_sampler(config: RunConfig, num_examples: int) -> GlobalBatchSampler:
    """The sampler of global batches. Raises UserError if the batch size is not a whole number of examples."""
    per_step, per_example = config.train.global_batch_size, config.train.targets_per_prompt
    if per_step % per_example:
        raise UserError(f"train.global_batch_size ({per_step}) must be a multiple of train.targets_per_prompt ({per_example})")
    train = config.train
    return GlobalBatchSampler(
        num_examples, per_step // per_example, train.epochs, train.seed, train.max_steps, train.shuffle_window
    )


def model_dtype(config: RunConfig, device: str) -> torch.dtype:
    """The dtype of the model. Commands settle auto before workers start (commands/dtype.py); here it is float32 on CPUs."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return torch.float32 if config.model.dtype == "float32" else torch.bfloat16


def build_builder(config: RunConfig, model_path: Path, data: PreparedData) -> PromptBuilder:
    """The prompt builder of this configuration for this model's tokenizer. Raises UserError if the two do not fit."""
    code = config.model.trust_remote_code
    vocab_size = read_shape(model_path, trust_remote_code=code).vocab_size
    tokenizer = load_tokenizer(model_path, trust_remote_code=code)
    return build_prompt_builder(config.prompt, tokenizer, data.titles, vocab_size=vocab_size)


def build_negative_sampler(
    config: RunConfig, num: int, data: PreparedData, lists: HardNegatives | None = None
) -> NegativeSampler:
    """The sampler of `num` negatives a group. lists: of negatives.kind=model; without them that kind draws uniformly."""
    negatives = config.negatives
    kind = "uniform" if negatives.kind == "model" and lists is None else negatives.kind
    return NegativeSampler(kind, num, config.train.seed, data.train_counts, negatives.popularity_power, data.held_out, lists)


def lora_spec(config: RunConfig) -> LoraSpec | None:
    """The adapter of this configuration, or None."""
    adapter = config.adapter
    if adapter.kind != "lora":
        return None
    return LoraSpec(adapter.rank, adapter.alpha, adapter.dropout, adapter.target_modules)


def usable(config: RunConfig, initial: InitialWeights, *, trains: bool = False) -> InitialWeights:
    """`initial`, once it is known that the model loads and takes the adapter. Every command asks this before a worker starts.

    trains: as in model_spec(). Raises UserError as models.model_check.check_model_folder.
    """
    adapter = lora_spec(config) if trains or initial.adapter is not None else None
    code = config.model.trust_remote_code
    check_model_folder(initial.model, adapter, saved_adapter=initial.adapter, trust_remote_code=code)
    return initial


def model_spec(
    config: RunConfig,
    initial: InitialWeights,
    builder: PromptBuilder | None,
    device: str,
    *,
    trains: bool,
    keep_reference: bool = False,
) -> ModelSpec:
    """The model of a run.

    trains: False for evaluation, which leaves out an adapter that no run has trained. builder: None on preference rows, which
    take no soft prompts. Raises UserError if soft prompts are missing, or are there without prompt.num_virtual.
    """
    adapter = lora_spec(config) if trains or initial.adapter is not None else None
    return ModelSpec(
        path=initial.model,
        dtype=model_dtype(config, device),
        device=device,
        attention=config.model.attention,
        fused_layers=config.model.fused_layers,
        activation_checkpointing=config.model.activation_checkpointing and trains,
        adapter=adapter,
        initial_adapter=initial.adapter,
        keep_reference=keep_reference,
        seed=config.train.seed,
        soft_prompt=_soft_prompt_spec(config, initial, builder, trains=trains and config.adapter.kind == "soft_prompt"),
        trust_remote_code=config.model.trust_remote_code,
    )


def _soft_prompt_spec(
    config: RunConfig, initial: InitialWeights, builder: PromptBuilder | None, *, trains: bool
) -> SoftPromptSpec | None:
    num = config.prompt.num_virtual
    if not num:
        if initial.soft_prompt is not None:
            raise UserError(
                f"prompt.num_virtual is 0 and {initial.soft_prompt} holds soft prompts; give this run the prompt section they "
                "were trained with"
            )
        return None
    if initial.soft_prompt is None and not trains:
        raise UserError(
            f"prompt.num_virtual ({num}) stands for vectors that nothing has trained; set train.init_from to a run of "
            "task.kind=delrec_distill, or prompt.num_virtual=0"
        )
    assert builder is not None
    known = np.unique(builder.titles.tokens)  # vectors start as embeddings of tokens that titles are made of
    drawn = known[(hash_u64(config.train.seed, _INIT_TOKENS, np.arange(num)) % np.uint64(len(known))).astype(np.int64)]
    return SoftPromptSpec(num, initial.soft_prompt, tuple(drawn.tolist()), trains)
