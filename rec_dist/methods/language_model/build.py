"""From a configuration and an objective to the task of a language model, on interactions or on preference rows."""

from collections.abc import Callable
from pathlib import Path

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.hard_negatives import HardNegatives
from rec_dist.data.dataset.preferences import open_preferences
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.prompts.builder import PromptBuilder, end_tokens
from rec_dist.data.prompts.text_prompts import tokenize_rows
from rec_dist.data.prompts.tokens import check_vocabulary, load_tokenizer
from rec_dist.data.sampling.targets import index_targets
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.builders import (
    build_batch_sampler,
    build_builder,
    build_negative_sampler,
    model_spec,
)
from rec_dist.methods.language_model.hard_negatives import check_source, hard_negatives, lists_key
from rec_dist.methods.language_model.interaction_examples import InteractionExamples
from rec_dist.methods.language_model.limits import check_evaluation
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.preference_rows import PreferenceRowExamples, preference_rows_task
from rec_dist.methods.language_model.task import language_task
from rec_dist.methods.task import Task
from rec_dist.models.language import ADAPTER_WEIGHTS
from rec_dist.models.shape import read_shape
from rec_dist.models.soft_prompt import SOFT_PROMPT_NAME
from rec_dist.storage.files import fingerprint, sampled_fingerprint, sha256


def build_language_task(
    config: RunConfig, initial: InitialWeights, device: str, *, objective: Objective, split: str = "train"
) -> Task:
    """The task on `split` of data.path. Raises UserError for anything that would fail later."""
    if config.train.targets_per_prompt > 1 and (config.prompt.style == "chat" or config.prompt.candidates == "listed"):
        raise UserError(
            "train.targets_per_prompt above 1 needs prompt.style=list and prompt.candidates=none: other prompts have one "
            "branch point, at their end"
        )
    if config.prompt.candidates == "listed" and config.negatives.kind != "uniform":
        raise UserError(
            f"negatives.kind ({config.negatives.kind}) has no effect when the prompt lists the candidates; set it to uniform"
        )
    if config.prompt.candidates == "listed" and objective.num_negatives >= config.prompt.num_candidates:
        raise UserError(
            f"negatives.num ({objective.num_negatives}) must be below prompt.num_candidates ({config.prompt.num_candidates})"
        )
    keep_reference = _keeps_reference(config, objective)
    data = open_data(config.data)
    rows = data.split(split)
    targets = index_targets(rows, config.train.targets_per_prompt)
    builder = build_builder(config, initial.model, data)
    shape = read_shape(initial.model, trust_remote_code=config.model.trust_remote_code)
    spec = model_spec(config, initial, builder, device, trains=True, keep_reference=keep_reference)
    # The driver checks before it makes the lists, and the valid split has none: both draw uniformly.
    lists = _hard_negatives(config, objective, data) if split == "train" else None
    negatives = build_negative_sampler(config, objective.num_negatives, data, lists)
    refresh = config.negatives.refresh_each_epoch
    examples = InteractionExamples(data, rows, targets, builder, negatives, refresh, objective.margins, objective.temperature)
    sampler = build_batch_sampler(config, max(len(targets), 1))
    examples.check(sampler, max_tokens=config.train.max_tokens_per_micro_batch, max_positions=shape.max_positions)
    check_evaluation(config, builder, data)
    key = reference_key(config, initial, builder, data, dtype=str(spec.dtype))
    return language_task(objective, spec, examples, sampler=sampler, reference_key=key, width=shape.width)


def _hard_negatives(config: RunConfig, objective: Objective, data: PreparedData) -> HardNegatives | None:
    """The lists of negatives.kind=model, as far as they are there. Raises UserError if they have no effect or cannot be made."""
    if config.negatives.kind != "model":
        return None
    if not objective.num_negatives:
        raise UserError(
            f"negatives.kind=model has no effect on task.kind={config.task.kind}, which needs no negatives; remove it"
        )
    check_source(config, data)
    return hard_negatives(config, data)


def _keeps_reference(config: RunConfig, objective: Objective) -> bool:
    """Whether the model keeps a frozen copy of its adapter. Raises UserError for an online reference without an adapter."""
    online = objective.needs_reference and config.task.reference == "online"
    if online and config.adapter.kind == "none":
        raise UserError("task.reference=online needs an adapter to switch off; set task.reference=cached for adapter.kind=none")
    return online


def build_text_task(
    config: RunConfig,
    initial: InitialWeights,
    device: str,
    *,
    objective_for: Callable[[int], Objective],
    max_rejected: int | None,
) -> Task:
    """The task on the preference rows of data.path. Raises UserError for anything that would fail later.

    objective_for: num_rejected, the most that a row has -> Objective. max_rejected: the most that the method takes, or None.
    """
    train = config.train
    if train.targets_per_prompt > 1:
        raise UserError("train.targets_per_prompt above 1 needs interactions; a preference row is one target, so set it to 1")
    if config.prompt.num_virtual:
        raise UserError(f"prompt.num_virtual ({config.prompt.num_virtual}) has no effect on preference rows; set it to 0")
    tokenizer = load_tokenizer(initial.model, trust_remote_code=config.model.trust_remote_code)
    shape = read_shape(initial.model, trust_remote_code=config.model.trust_remote_code)
    end = end_tokens(config.prompt, tokenizer)
    stored = open_preferences(config.data).rows()
    rows = tokenize_rows(stored, tokenizer, end, rejected=max_rejected != 0, special_tokens=config.prompt.special_tokens)
    for ids in (rows.prompts, rows.completions):
        check_vocabulary(tokenizer, ids, shape.vocab_size)
    most = int(rows.num_rejected.max())
    if max_rejected is not None and most > max_rejected:
        raise UserError(
            f"task.kind={config.task.kind} takes rows with {max_rejected} rejected completion, and data.path has rows with "
            f"{most} rejected completions; set task.kind=dmpo, sdpo, mppo or dynamicpo"
        )
    objective = objective_for(most)
    spec = model_spec(config, initial, None, device, trains=True, keep_reference=_keeps_reference(config, objective))
    adapter = sha256(initial.adapter / ADAPTER_WEIGHTS) if initial.adapter else None
    extent = [train.epochs, train.max_steps, train.global_batch_size, train.seed, train.shuffle_window]
    examples = PreferenceRowExamples(rows, compares=objective.num_negatives > 0)
    examples.check(max_tokens=train.max_tokens_per_micro_batch, max_positions=shape.max_positions)
    return preference_rows_task(
        objective,
        spec,
        examples,
        end,
        sampler=build_batch_sampler(config, len(rows)),
        reference_key=fingerprint([*_model_prints(initial.model), adapter, rows.fingerprint, extent, str(spec.dtype)]),
        width=shape.width,
    )


def reference_key(config: RunConfig, initial: InitialWeights, builder: PromptBuilder, data: PreparedData, *, dtype: str) -> str:
    """Changes with the model a run starts from, the prompt, the data, the negatives and which targets share a prompt."""
    adapter = sha256(initial.adapter / ADAPTER_WEIGHTS) if initial.adapter else None
    vectors = [sha256(initial.soft_prompt / SOFT_PROMPT_NAME)] if initial.soft_prompt else []
    draws = [
        config.negatives.model_dump(exclude={"model"}),
        config.train.seed,
        config.train.targets_per_prompt,
        config.train.global_batch_size,
    ]
    extent = [config.train.epochs, config.train.max_steps, config.train.shuffle_window]
    model = _model_prints(initial.model)
    lists = [lists_key(config, data)] if config.negatives.kind == "model" else []
    return fingerprint([*model, adapter, builder.fingerprint, data.manifest.fingerprint, draws, extent, dtype, *vectors, *lists])


def _model_prints(folder: Path) -> list[str]:
    """Of the weights, and of what is computed with them: positions, windows and soft caps stand in config.json."""
    return [sampled_fingerprint(folder, "*.safetensors"), sha256(folder / "config.json")]
