"""Sequential recommenders as a task: next-item prediction on ids. They are baselines of language models, and teachers of some.

An example is a run of up to max_length neighbouring targets of one user, with the items before them. A row longer than
that makes several examples, so no target is dropped, and each is scored once an epoch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.teacher import write_teacher
from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit, open_data
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.item_sampler import ItemSampler
from rec_dist.data.sampling.targets import TargetIndex, index_targets
from rec_dist.errors import UserError
from rec_dist.methods.sequential.config import SequentialConfig
from rec_dist.methods.sequential.initial_embeddings import initial_items
from rec_dist.methods.sequential.next_item import NextItem, Recommender, Shape, build_recommender
from rec_dist.methods.sequential.saved_model import WEIGHTS_NAME, kind_of, save_recommender, shape_of, unread_keys
from rec_dist.methods.sequential.sequences import SequenceBatch, dummy_batch, lay_out
from rec_dist.methods.sequential.teacher import top_items
from rec_dist.methods.task import Task, TaskModel
from rec_dist.packing.sizes import OneByOne, Sizes
from rec_dist.runtime.arrays import I32, I64


@dataclass(frozen=True)
class SequenceExample:
    """items (n,) int32: what the model reads; targets (m <= n,) int32: what follows its last m positions."""

    items: I32
    targets: I32

    @property
    def num_tokens(self) -> int:
        """Positions."""
        return len(self.items)

    @property
    def num_groups(self) -> int:
        """Targets."""
        return len(self.targets)

    @property
    def num_scored(self) -> int:
        """Targets: an item is one token."""
        return len(self.targets)

    @property
    def num_logical_tokens(self) -> int:
        """num_tokens: a sequence shares nothing that another system would write out again."""
        return len(self.items)


@dataclass(frozen=True)
class SequenceExamples:
    """Implements methods.task.TaskData. negatives: where the softmax is sampled; None where it is the full one."""

    prepared: PreparedData
    split: SequenceSplit
    targets: TargetIndex
    max_length: int
    negatives: ItemSampler | None

    def example(self, index: int) -> SequenceExample:
        """Build the run of targets of example `index`, after as many of the items before them as max_length leaves room for."""
        row, start, stop = int(self.targets.rows[index]), int(self.targets.starts[index]), int(self.targets.stops[index])
        items = self.split.items_of(row)
        return SequenceExample(items[max(0, stop - 1 - self.max_length) : stop - 1], items[start:stop])

    def draw(self, indices: I64, epochs: I64) -> OneByOne:
        """Nothing is drawn before a batch is laid out; every epoch has the same sequences."""
        starts, stops = self.targets.starts[indices], self.targets.stops[indices]
        items, targets = np.minimum(stops - 1, self.max_length), stops - starts
        return OneByOne(Sizes(items, targets, targets, items), lambda place: self.example(int(indices[place])))

    def collate(self, examples: Sequence[SequenceExample], *, step: int) -> SequenceBatch:
        """Lay out one batch, with step `step`'s negatives if the softmax is sampled; without examples, the dummy batch."""
        batch = (
            lay_out([example.items for example in examples], [example.targets for example in examples])
            if examples
            else dummy_batch()
        )
        return batch if self.negatives is None else batch.with_negatives(*self.negatives.draw(step))

    def users(self, indices: I64) -> list[int]:
        """Return the numbers of the users in these examples, each once, in the order of the data."""
        return self.split.users_of(self.targets.rows[indices])

    def check(self, *, max_tokens: int, top_h: int) -> None:
        """Raises UserError for a split without targets, a micro-batch smaller than the longest sequence, or a top_h too large."""
        if not len(self.targets):
            raise UserError(
                f"data.path: the split {self.split.name} has no target with an item before it; prepare data with longer sequences"
            )
        if max_tokens < self.max_length:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than a sequence may be "
                f"(task.sequential.max_length is {self.max_length}); raise it or lower task.sequential.max_length"
            )
        longest = int((self.split.offsets[1:] - self.split.offsets[:-1]).max()) - 1
        if top_h > self.prepared.num_items - longest:
            raise UserError(
                f"task.sequential.top_h ({top_h}) is more than the longest history leaves: {self.prepared.num_items} "
                f"items of the catalogue less {longest}; lower it"
            )


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


def initial_module(shape: Shape, *, seed: int, items: Tensor | None) -> NextItem:
    """The model with initial weights that are a function of the seed alone, except for item embeddings that are given.

    items: (I, D), or None. The caller's generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_recommender(kind_of(shape), asdict(shape))
    if items is not None:
        with torch.no_grad():
            model.item_embedding.weight.copy_(items)
    return NextItem(model)


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
    )
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
            build=lambda: initial_module(shape, seed=train.seed, items=items),
            dtype=torch.float32,  # on every device
            width=shape.width,
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
    if unread := unread_keys(config):
        keys = ", ".join(unread)
        notes.append(f"WARNING: task.kind=sequential trains no language model, so these keys have no effect: {keys}")
    return notes


def _initial_items(settings: SequentialConfig, data: PreparedData) -> Tensor | None:
    if settings.init_embeddings is None:
        return None
    folder = Path(settings.init_embeddings)
    return initial_items(folder, data_fingerprint=data.manifest.fingerprint, width=settings.width)
