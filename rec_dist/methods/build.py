"""From a configuration to a task: the one place where methods are chosen by name."""

from pathlib import Path

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.manifest import PREFERENCES, Manifest
from rec_dist.data.dataset.preferences import open_preferences
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.prompts.builder import PromptBuilder, end_tokens
from rec_dist.data.prompts.text_prompts import tokenize_rows
from rec_dist.data.prompts.tokens import load_tokenizer
from rec_dist.data.sampling.targets import index_targets
from rec_dist.errors import UserError
from rec_dist.methods.delrec.build import build_distill_task
from rec_dist.methods.delrec.choice import delrec
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.builders import (
    build_batch_sampler,
    build_builder,
    build_negative_sampler,
    model_spec,
    read_shape,
)
from rec_dist.methods.language_model.interaction_examples import InteractionExamples
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.preference_rows import PreferenceRowExamples, preference_rows_task
from rec_dist.methods.language_model.task import language_task
from rec_dist.methods.p2rec.build import build_reconstruct_task
from rec_dist.methods.preference import dmpo, dpo, sdpo, sft
from rec_dist.methods.sequential.task import build_sequential_task
from rec_dist.methods.task import Task
from rec_dist.models.language import ADAPTER_WEIGHTS
from rec_dist.models.soft_prompt import SOFT_PROMPT_NAME
from rec_dist.storage.files import fingerprint, sampled_fingerprint, sha256


def choose_objective(config: RunConfig, num_rejected: int | None = None) -> Objective:
    """The method that task.kind names. num_rejected: where the data set says how many; None: negatives.num.

    UserError: a kind that is a task of its own.
    """
    beta, num = config.task.beta, config.negatives.num if num_rejected is None else num_rejected
    choices = {
        "sft": lambda: sft(),
        "dpo": lambda: dpo(beta=beta, num_negatives=num),
        "dmpo": lambda: dmpo(beta=beta, num_negatives=num),
        "sdpo": lambda: sdpo(beta=beta, num_negatives=num),
        "delrec": lambda: delrec(num_negatives=num),
    }
    if config.task.kind not in choices:
        raise UserError(f"task.kind={config.task.kind} compares no completions; this takes one of {', '.join(choices)}")
    return choices[config.task.kind]()


def build_language_task(config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
    """The task on `split` of data.path, checked: what would fail later raises UserError here."""
    method = choose_objective(config)
    if config.train.targets_per_prompt > 1 and (config.prompt.style == "chat" or config.prompt.candidates == "listed"):
        raise UserError(
            "train.targets_per_prompt above 1 needs prompt.style=list and prompt.candidates=none: the rest completion point at their end"
        )
    if config.prompt.candidates == "listed" and config.negatives.kind != "uniform":
        raise UserError(
            f"negatives.kind ({config.negatives.kind}) has no effect when the prompt lists the candidates; set it to uniform"
        )
    if config.prompt.candidates == "listed" and method.num_negatives >= config.prompt.num_candidates:
        raise UserError(
            f"negatives.num ({method.num_negatives}) must be below prompt.num_candidates ({config.prompt.num_candidates})"
        )
    keep_reference = _keeps_reference(config, method)
    data = open_data(config.data)
    rows = data.split(split)
    targets = index_targets(rows, config.train.targets_per_prompt)
    builder, shape = build_builder(config, initial.model, data), read_shape(initial.model)
    spec = model_spec(config, initial, builder, device, trains=True, keep_reference=keep_reference)
    negatives = build_negative_sampler(config, method.num_negatives, data.train_counts)
    examples = InteractionExamples(data, rows, targets, builder, negatives, config.negatives.refresh_each_epoch)
    sampler = build_batch_sampler(config, max(len(targets), 1))
    examples.check(sampler, max_tokens=config.train.max_tokens_per_micro_batch, max_positions=shape.max_positions)
    key = reference_key(config, initial, builder, data, dtype=str(spec.dtype))
    return language_task(method, spec, examples, sampler=sampler, reference_key=key, width=shape.width)


def _keeps_reference(config: RunConfig, method: Objective) -> bool:
    """Whether the model keeps a frozen copy of its adapter. Raises UserError for an online reference without an adapter."""
    online = method.needs_reference and config.task.reference == "online"
    if online and config.adapter.kind == "none":
        raise UserError("task.reference=online needs an adapter to switch off; set task.reference=cached for adapter.kind=none")
    return online


def build_text_task(config: RunConfig, initial: InitialWeights, device: str) -> Task:
    """The task on the preference rows of data.path, checked: what would fail later raises UserError here."""
    kind, train = config.task.kind, config.train
    if kind not in ("sft", "dpo", "dmpo", "sdpo"):
        raise UserError(f"data.path holds preference rows, and task.kind={kind} ranks items; set it to sft, dpo, dmpo or sdpo")
    if train.targets_per_prompt > 1:
        raise UserError("train.targets_per_prompt above 1 needs interactions; a preference row is one target, so set it to 1")
    if config.prompt.num_virtual:
        raise UserError(f"prompt.num_virtual ({config.prompt.num_virtual}) has no effect on preference rows; set it to 0")
    tokenizer, shape = load_tokenizer(initial.model), read_shape(initial.model)
    end = end_tokens(config.prompt, tokenizer)
    rows = tokenize_rows(open_preferences(config.data).rows(), tokenizer, end, rejected=kind != "sft")
    most = int(rows.num_rejected.max())
    if kind == "dpo" and most > 1:
        raise UserError(
            f"task.kind=dpo compares pairs, and data.path has rows with {most} rejected completions; set task.kind=dmpo or sdpo"
        )
    method = choose_objective(config, most)
    spec = model_spec(config, initial, None, device, trains=True, keep_reference=_keeps_reference(config, method))
    adapter = sha256(initial.adapter / ADAPTER_WEIGHTS) if initial.adapter else None
    extent = [train.epochs, train.max_steps, train.global_batch_size, train.seed, train.shuffle_window]
    examples = PreferenceRowExamples(rows, compares=method.num_negatives > 0)
    examples.check(max_tokens=train.max_tokens_per_micro_batch, max_positions=shape.max_positions)
    return preference_rows_task(
        method,
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
    draws = [config.negatives.model_dump(), config.train.seed, config.train.targets_per_prompt, config.train.global_batch_size]
    extent = [config.train.epochs, config.train.max_steps, config.train.shuffle_window]
    model = _model_prints(initial.model)
    return fingerprint([*model, adapter, builder.fingerprint, data.manifest.fingerprint, draws, extent, dtype, *vectors])


def _model_prints(folder: Path) -> list[str]:
    """Of the weights, and of what is computed with them: positions, windows and soft caps stand in config.json."""
    return [sampled_fingerprint(folder, "*.safetensors"), sha256(folder / "config.json")]


def build_task(config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
    """The task that task.kind names, on `split` (train, valid) of data.path."""
    if config.task.kind == "sequential":
        return build_sequential_task(config, split=split)
    if config.task.kind == "delrec_distill":
        if split != "train":
            raise UserError("checkpoint.validation_examples: a teacher has no lists for validation rows; set it to 0")
        return build_distill_task(config, initial, device)
    if config.task.kind == "p2rec_reconstruct":
        if split != "train":
            raise UserError(
                "checkpoint.validation_examples: what users prefer is known of their training part alone; set it to 0"
            )
        return build_reconstruct_task(config, initial, device)
    if config.adapter.kind == "soft_prompt":
        raise UserError(
            f"adapter.kind=soft_prompt trains under task.kind=delrec_distill, not {config.task.kind}; set adapter.kind=lora"
        )
    if Manifest.load(config.data.path).kind != PREFERENCES:
        return build_language_task(config, initial, device, split=split)
    if split != "train":
        raise UserError(
            f"data.path ({config.data.path}) holds preference rows, which all train, so there is no {split} split; "
            "set checkpoint.validation_examples=0"
        )
    return build_text_task(config, initial, device)
