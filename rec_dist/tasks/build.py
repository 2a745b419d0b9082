"""From a configuration to a task: the one place where methods are chosen by name."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset import PreparedData, open_data
from rec_dist.data.negatives import NegativeSampler
from rec_dist.data.plan import Order
from rec_dist.data.prompt import PromptBuilder, build_prompt_builder
from rec_dist.data.targets import index_targets
from rec_dist.data.tokens import load_tokenizer
from rec_dist.models.language import ADAPTER_WEIGHTS, LoraSpec
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.files import fingerprint, read_object, sampled_fingerprint, sha256
from rec_dist.stream.trunk import I64
from rec_dist.tasks.dmpo import dmpo
from rec_dist.tasks.dpo import dpo
from rec_dist.tasks.language import BASE_NAME, LanguageTask, ModelSpec
from rec_dist.tasks.method import Method
from rec_dist.tasks.sdpo import sdpo
from rec_dist.tasks.sequential import build_sequential_task
from rec_dist.tasks.sft import sft
from rec_dist.tasks.task import Task


@dataclass(frozen=True)
class Start:
    """What a run starts from: a model folder, and an adapter folder where the run it starts from trained one."""

    model: Path
    adapter: Path | None = None

    def fingerprints(self) -> dict[str, str | None]:
        """A sampled hash of the weights of each; None where there are none."""
        folders = {"model": self.model if self.model.name else None, "adapter": self.adapter}
        return {name: sampled_fingerprint(folder, "*.safetensors") if folder else None for name, folder in folders.items()}


def choose_method(config: RunConfig) -> Method:
    """The method that task.kind names."""
    beta, num = config.task.beta, config.negatives.num
    choices = {
        "sft": lambda: sft(),
        "dpo": lambda: dpo(beta=beta, num_negatives=num),
        "dmpo": lambda: dmpo(beta=beta, num_negatives=num),
        "sdpo": lambda: sdpo(beta=beta, num_negatives=num),
    }
    return choices[config.task.kind]()


def build_order(config: RunConfig, num_units: int) -> Order:
    """The order of units. Raises UserError when the global batch cannot be made of whole units."""
    per_step, per_unit = config.train.groups_per_step, config.train.targets_per_trunk
    if per_step % per_unit:
        raise UserError(f"train.groups_per_step ({per_step}) must be a multiple of train.targets_per_trunk ({per_unit})")
    train = config.train
    return Order(num_units, per_step // per_unit, train.epochs, train.seed, train.max_steps, train.shuffle_window)


def model_dtype(config: RunConfig, device: str) -> torch.dtype:
    """auto: bfloat16 on GPUs; float32 on CPUs, where bfloat16 is 90 times slower."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return torch.float32 if config.model.dtype == "float32" else torch.bfloat16


def build_builder(config: RunConfig, model_path: Path, data: PreparedData) -> PromptBuilder:
    """The prompt builder of this configuration for this model's tokenizer."""
    return build_prompt_builder(config.prompt, load_tokenizer(model_path), data.titles)


def build_sampler(config: RunConfig, num: int, train_counts: I64) -> NegativeSampler:
    """The negatives of this configuration."""
    negatives = config.negatives
    return NegativeSampler(negatives.kind, num, config.train.seed, train_counts, negatives.popularity_power)


def lora_spec(config: RunConfig) -> LoraSpec | None:
    """The adapter of this configuration; None for full fine-tuning."""
    adapter = config.adapter
    if adapter.kind == "none":
        return None
    return LoraSpec(adapter.rank, adapter.alpha, adapter.dropout, adapter.target_modules)


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
    builder, shape, dtype = build_builder(config, start.model, data), read_shape(start.model), model_dtype(config, device)
    task = LanguageTask(
        method,
        ModelSpec(
            path=start.model,
            dtype=dtype,
            device=device,
            attention=config.model.attention,
            tokens_per_pack=config.train.tokens_per_pack,
            activation_checkpointing=config.model.activation_checkpointing,
            adapter=lora_spec(config),
            start_adapter=start.adapter,
            keep_reference=method.needs_reference and config.task.reference == "online",
            seed=config.train.seed,
        ),
        data,
        rows,
        targets,
        builder,
        build_sampler(config, method.num_negatives, data.train_counts),
        order=build_order(config, max(len(targets), 1)),
        refresh_negatives=config.negatives.refresh_each_epoch,
        reference_key=reference_key(config, start, builder, data, dtype=str(dtype)),
        width=shape.width,
    )
    task.check(config.train.tokens_per_pack, max_positions=shape.max_positions)
    return task


def reference_key(config: RunConfig, start: Start, builder: PromptBuilder, data: PreparedData, *, dtype: str) -> str:
    """Changes with the model a run starts from, the prompt, the data, the negatives and which targets share a trunk."""
    adapter = sha256(start.adapter / ADAPTER_WEIGHTS) if start.adapter else None
    model = sampled_fingerprint(start.model, "*.safetensors")
    draws = [config.negatives.model_dump(), config.train.seed, config.train.targets_per_trunk, config.train.groups_per_step]
    extent = [config.train.epochs, config.train.max_steps, config.train.shuffle_window]
    return fingerprint([model, adapter, builder.fingerprint, data.manifest.fingerprint, draws, extent, dtype])


@dataclass(frozen=True)
class ModelShape:
    """What set-up needs of a model before it is loaded. max_positions: None where nothing limits them."""

    width: int
    max_positions: int | None


def read_shape(model_path: Path) -> ModelShape:
    """The shape in a model folder's config.json, under the names that the families use."""
    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    config = {**config, **config.get("text_config", {})}
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    width = config.get("hidden_size", config.get("n_embd", 1024))
    return ModelShape(width=int(width), max_positions=int(positions) if positions is not None else None)


def build_task(config: RunConfig, start: Start, device: str, *, split: str = "train") -> Task:
    """The task that task.kind names, on `split` (train, valid) of data.path."""
    if config.task.kind == "sequential":
        return build_sequential_task(config, split=split)
    return build_language_task(config, start, device, split=split)


def resolve_start(model_path: Path, init_from: Path | None, *, trains_adapter: bool) -> Start:
    """Where the model starts: model_path, or the finished run `init_from`, whose adapter goes on and whose base model counts.

    Raises UserError when that run has no model, or an adapter that this run would not train.
    """
    if init_from is None:
        return Start(model_path)
    saved = init_from / "model"
    if (saved / ADAPTER_WEIGHTS).is_file():
        if not trains_adapter:
            raise UserError(f"train.init_from ({init_from}) holds an adapter and adapter.kind is none; set adapter.kind=lora")
        return Start(base_of(saved, model_path), saved)
    if (saved / "config.json").is_file():
        return Start(saved)
    raise UserError(f"train.init_from ({init_from}) holds no finished model; let that run finish first")


def base_of(adapter: Path, model_path: Path) -> Path:
    """The model that a saved adapter belongs to: model_path, or the one it was trained on. Raises UserError for neither."""
    saved = read_object(adapter / BASE_NAME, "remove finished.json of that run and train it again, which ends where it ended")
    for folder in (model_path, Path(saved["path"])):
        if folder.is_dir() and sampled_fingerprint(folder, "*.safetensors") == saved["fingerprint"]:
            return folder
    raise UserError(
        f"the adapter in {adapter} belongs to another model ({saved['path']}) than model.path ({model_path}); name that one"
    )
