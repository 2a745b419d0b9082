"""From a configuration to a task: the one place where methods are chosen by name."""

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset import PreparedData, open_data
from rec_dist.data.prompt import PromptBuilder
from rec_dist.data.targets import index_targets
from rec_dist.models.language import ADAPTER_WEIGHTS
from rec_dist.models.soft_prompt import SOFT_PROMPT_NAME
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.files import fingerprint, sampled_fingerprint, sha256
from rec_dist.tasks.delrec import delrec
from rec_dist.tasks.delrec_build import build_distill_task
from rec_dist.tasks.dmpo import dmpo
from rec_dist.tasks.dpo import dpo
from rec_dist.tasks.language import LanguageTask
from rec_dist.tasks.method import Method
from rec_dist.tasks.pieces import build_builder, build_order, build_sampler, model_spec, read_shape
from rec_dist.tasks.sdpo import sdpo
from rec_dist.tasks.sequential import build_sequential_task
from rec_dist.tasks.sft import sft
from rec_dist.tasks.start import Start
from rec_dist.tasks.task import Task


def choose_method(config: RunConfig) -> Method:
    """The method that task.kind names."""
    beta, num = config.task.beta, config.negatives.num
    choices = {
        "sft": lambda: sft(),
        "dpo": lambda: dpo(beta=beta, num_negatives=num),
        "dmpo": lambda: dmpo(beta=beta, num_negatives=num),
        "sdpo": lambda: sdpo(beta=beta, num_negatives=num),
        "delrec": lambda: delrec(num_negatives=num),
    }
    return choices[config.task.kind]()


def build_language_task(config: RunConfig, start: Start, device: str, *, split: str = "train") -> LanguageTask:
    """The task on `split` of data.path, checked: what would fail later raises UserError here."""
    method = choose_method(config)
    if config.train.targets_per_trunk > 1 and (config.prompt.style == "chat" or config.prompt.candidates == "listed"):
        raise UserError(
            "train.targets_per_trunk above 1 needs prompt.style=list and prompt.candidates=none: the rest fork at their end"
        )
    if config.prompt.candidates == "listed" and config.negatives.kind != "uniform":
        raise UserError(
            f"negatives.kind ({config.negatives.kind}) has no effect when the prompt lists the candidates; set it to uniform"
        )
    if config.prompt.candidates == "listed" and method.num_negatives >= config.prompt.num_candidates:
        raise UserError(
            f"negatives.num ({method.num_negatives}) must be below prompt.num_candidates ({config.prompt.num_candidates})"
        )
    if config.task.reference == "online" and method.needs_reference and config.adapter.kind == "none":
        raise UserError("task.reference=online needs an adapter to switch off; set task.reference=cached for adapter.kind=none")
    data = open_data(config.data)
    rows = data.split(split)
    targets = index_targets(rows, config.train.targets_per_trunk)
    builder, shape = build_builder(config, start.model, data), read_shape(start.model)
    keep_reference = method.needs_reference and config.task.reference == "online"
    spec = model_spec(config, start, builder, device, trains=True, keep_reference=keep_reference)
    task = LanguageTask(
        method,
        spec,
        data,
        rows,
        targets,
        builder,
        build_sampler(config, method.num_negatives, data.train_counts),
        order=build_order(config, max(len(targets), 1)),
        refresh_negatives=config.negatives.refresh_each_epoch,
        reference_key=reference_key(config, start, builder, data, dtype=str(spec.dtype)),
        width=shape.width,
    )
    task.check(config.train.tokens_per_pack, max_positions=shape.max_positions)
    return task


def reference_key(config: RunConfig, start: Start, builder: PromptBuilder, data: PreparedData, *, dtype: str) -> str:
    """Changes with the model a run starts from, the prompt, the data, the negatives and which targets share a trunk."""
    adapter = sha256(start.adapter / ADAPTER_WEIGHTS) if start.adapter else None
    vectors = [sha256(start.soft_prompt / SOFT_PROMPT_NAME)] if start.soft_prompt else []
    model = sampled_fingerprint(start.model, "*.safetensors")
    draws = [config.negatives.model_dump(), config.train.seed, config.train.targets_per_trunk, config.train.groups_per_step]
    extent = [config.train.epochs, config.train.max_steps, config.train.shuffle_window]
    return fingerprint([model, adapter, builder.fingerprint, data.manifest.fingerprint, draws, extent, dtype, *vectors])


def build_task(config: RunConfig, start: Start, device: str, *, split: str = "train") -> Task:
    """The task that task.kind names, on `split` (train, valid) of data.path."""
    if config.task.kind == "sequential":
        return build_sequential_task(config, split=split)
    if config.task.kind == "delrec_distill":
        if split != "train":
            raise UserError("checkpoint.validation_units: a teacher has no lists for validation rows; set it to 0")
        return build_distill_task(config, start, device)
    if config.adapter.kind == "soft_prompt":
        raise UserError(
            f"adapter.kind=soft_prompt trains under task.kind=delrec_distill, not {config.task.kind}; set adapter.kind=lora"
        )
    return build_language_task(config, start, device, split=split)
