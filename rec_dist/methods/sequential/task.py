"""Sequential recommenders as a task: next-item prediction on ids. They are baselines of language models, teachers of some, and
students of any.

An example is a run of up to max_length neighbouring targets of one user, with the items before them. A row longer than
that makes several examples, so no target is dropped, and each is scored once an epoch.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.scored_lists import read_lists
from rec_dist.data.artifacts.teacher import write_teacher
from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit, open_data
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.item_sampler import ItemSampler
from rec_dist.data.sampling.targets import index_targets
from rec_dist.errors import UserError
from rec_dist.methods.sequential.config import DistilConfig, SequentialConfig
from rec_dist.methods.sequential.examples import SequenceExamples
from rec_dist.methods.sequential.initial_embeddings import initial_items
from rec_dist.methods.sequential.next_item import TEACHER_METRICS, NextItem, Recommender, Shape, build_recommender
from rec_dist.methods.sequential.saved_model import WEIGHTS_NAME, kind_of, save_recommender, shape_of, unread_keys
from rec_dist.methods.sequential.soft_targets import SoftTargets
from rec_dist.methods.sequential.teacher import top_items
from rec_dist.methods.task import Task, TaskModel


@dataclass(frozen=True)
class SequentialModelSaver:
    """Writes model/: weights, shape and catalogue, and with top_h what the model leaves as a teacher."""

    shape: Shape
    examples: SequenceExamples
    top_h: int

    def __call__(self, weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        """As methods.task.SaveModel. What is written is read back and compared."""
        assert weights, "no trainable weights were gathered: an empty model would be saved"
        own = {name.removeprefix("model."): value for name, value in weights.items()}
        model = save_recommender(self.shape, own, self.examples.prepared, folder)
        if self.top_h:
            self._write_teacher(model, str(next(module.parameters()).device), folder)

    def _write_teacher(self, model: Recommender, device: str, folder: Path) -> None:
        """Rank 0 does this while the others wait."""
        embeddings = model.item_embedding.weight.detach().numpy()
        lists = top_items(
            model.to(device),
            self.examples.split,
            num_items=self.shape.num_items,
            max_length=self.shape.max_length,
            top_h=self.top_h,
            device=device,
        )
        write_teacher(
            folder,
            embeddings,
            lists,
            top_h=self.top_h,
            weights=folder / WEIGHTS_NAME,
            data_fingerprint=self.examples.prepared.manifest.fingerprint,
        )


def initial_module(shape: Shape, *, seed: int, items: Tensor | None, teacher_weight: float | None) -> NextItem:
    """The model with initial weights that are a function of the seed alone, except for item embeddings that are given.

    items: (I, D), or None. teacher_weight: as NextItem takes it. The caller's generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_recommender(kind_of(shape), asdict(shape))
    if items is not None:
        with torch.no_grad():
            model.item_embedding.weight.copy_(items)
    return NextItem(model, teacher_weight)


def build_sequential_task(config: RunConfig, *, split: str = "train") -> Task:
    """The task on `split` of data.path, checked.

    Raises UserError for a shape that cannot work, a micro-batch too small, data without targets, or a setting without
    effect.
    """
    settings, train = config.task.section(SequentialConfig), config.train
    if train.init_from is not None:
        raise UserError(f"train.init_from ({train.init_from}) has no effect on task.kind=sequential; remove it")
    if train.targets_per_prompt != 1:
        raise UserError(
            f"train.targets_per_prompt ({train.targets_per_prompt}) has no effect on task.kind=sequential, which scores every "
            "position of a sequence; remove it"
        )
    if config.model.dtype == "bfloat16":
        raise UserError("model.dtype=bfloat16 has no effect on task.kind=sequential, which is float32; set model.dtype=auto")
    if config.model.attention == "flex":
        raise UserError(
            "model.attention=flex has no effect on task.kind=sequential, whose batches have no branch points; set it to auto"
        )
    if config.model.fused_layers == "liger":
        raise UserError("model.fused_layers=liger has no effect on task.kind=sequential, which has none of them; set it to auto")
    data = open_data(config.data)
    rows = data.split(split)
    num_sampled = settings.num_sampled
    sampled = 0 < num_sampled < data.num_items
    shape = shape_of(settings, data.num_items)
    examples = SequenceExamples(
        data,
        rows,
        index_targets(rows, settings.max_length),
        shape.max_length,
        ItemSampler(num_sampled, train.seed, data.train_counts) if sampled else None,
        _teacher(settings.distil, data, rows) if split == "train" else None,
    )
    teacher_weight = None if settings.distil.lists is None else settings.distil.weight
    top_h = settings.top_h if split == "train" else 0
    examples.check(max_tokens=train.max_tokens_per_micro_batch, top_h=top_h)
    items = _initial_items(settings, data) if split == "train" else None
    sampler = GlobalBatchSampler(
        len(examples.targets), train.global_batch_size, train.epochs, train.seed, train.max_steps, train.shuffle_window
    )
    return Task(
        name="sequential",
        sampler=sampler,
        data=examples,
        model=TaskModel(
            build=lambda: initial_module(shape, seed=train.seed, items=items, teacher_weight=teacher_weight),
            dtype=torch.float32,  # on every device
            width=shape.width,
            metric_names=() if teacher_weight is None else TEACHER_METRICS,
            mean_over="tokens",  # an item is one token; the loss is in nats
        ),
        save=SequentialModelSaver(shape, examples, top_h),
        notes=lambda: _notes(config, examples, sampler),
    )


def _notes(config: RunConfig, examples: SequenceExamples, sampler: GlobalBatchSampler) -> list[str]:
    """Which softmax trains, where the keys do not say so plainly; keys without effect; whether the data fits the cache."""
    notes = examples.prepared.cache_notes(examples.split.name, sampler.window)
    num_sampled, num_items = config.task.section(SequentialConfig).num_sampled, examples.prepared.num_items
    if examples.negatives is not None:
        notes.append(f"the loss is an estimate from {num_sampled:,} sampled items of {num_items:,}, lower on average")
    elif num_sampled:
        notes.append(f"task.sequential.num_sampled ({num_sampled:,}) covers the catalogue: the softmax is the full one")
    if examples.teacher is not None:
        notes.append(f"the teacher has ranked items for {len(examples.teacher):,} of {examples.split.num_targets:,} targets")
    if unread := unread_keys(config):
        keys = ", ".join(unread)
        notes.append(f"WARNING: task.kind=sequential trains no language model, so these keys have no effect: {keys}")
    return notes


def _initial_items(settings: SequentialConfig, data: PreparedData) -> Tensor | None:
    if settings.init_embeddings is None:
        return None
    folder = Path(settings.init_embeddings)
    return initial_items(folder, data_fingerprint=data.manifest.fingerprint, width=settings.width)


def _teacher(settings: DistilConfig, data: PreparedData, split: SequenceSplit) -> SoftTargets | None:
    """Raises UserError for keys that have no effect without a teacher's lists."""
    if settings.lists is not None:
        lists = read_lists(Path(settings.lists), data_fingerprint=data.manifest.fingerprint)
        return SoftTargets(lists, split, settings.temperature)
    for key in ("weight", "temperature"):
        if getattr(settings, key) != DistilConfig.model_fields[key].default:
            raise UserError(
                f"task.sequential.distil.{key} ({getattr(settings, key)}) has no effect without task.sequential.distil.lists; remove "
                "it, or train with `rec-dist distil`"
            )
    return None
