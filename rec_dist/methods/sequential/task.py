"""Sequential recommenders as a task: next-item prediction on ids, the baselines beside every language model and the teachers of some.

A example is a run of up to max_length neighbouring targets of one user with the items before them. A row longer than that makes
several examples, so no target is dropped, and each is scored once an epoch.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from rec_dist.runtime.arrays import I32, I64


@dataclass(frozen=True)
class SequenceExample:
    """items (n,) int32, what the model reads; targets (m <= n,) int32, what follows its last m positions."""

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
        """num_tokens: nothing is shared that a peer would write out again."""
        return len(self.items)


class SequentialTask:
    """Implements tasks.task.Task. A mean loss is over targets, in nats; float32 on every device."""

    name = "sequential"
    metric_names: tuple[str, ...] = ()
    needs_reference = False
    counts_tokens = True
    dtype = torch.float32
    reference_key = ""

    def __init__(
        self,
        shape: Shape,
        data: PreparedData,
        split: SequenceSplit,
        targets: TargetIndex,
        *,
        sampler: GlobalBatchSampler,
        seed: int,
        num_sampled: int,
        top_h: int,
        items: Tensor | None = None,
        unread: Sequence[str] = (),
    ) -> None:
        self.sampler = sampler
        self.width = shape.width
        self._shape, self._data, self._split, self._targets, self._seed = shape, data, split, targets, seed
        self._negatives = ItemSampler(num_sampled, seed, data.train_counts) if 0 < num_sampled < data.num_items else None
        self._num_sampled, self._top_h, self._items = num_sampled, top_h, items
        self._unread = unread

    def draw_epoch(self, epoch: int) -> int:
        """0: a example draws nothing."""
        return 0

    def build_module(self) -> NextItem:
        """The model with initial weights that are a function of the seed alone, but for item embeddings that are given; the caller's
        generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = build_recommender(kind_of(self._shape), asdict(self._shape))
        if self._items is not None:
            with torch.no_grad():
                model.item_embedding.weight.copy_(self._items)
        return NextItem(model)

    def example(self, index: int, epoch: int) -> SequenceExample:
        """The run of targets of example `index`, after as many of the items before them as max_length leaves room for."""
        row, start, stop = int(self._targets.rows[index]), int(self._targets.starts[index]), int(self._targets.stops[index])
        items = self._split.items_of(row)
        return SequenceExample(items[max(0, stop - 1 - self._shape.max_length) : stop - 1], items[start:stop])

    def examples(self, indices: I64, epochs: I64) -> list[SequenceExample]:
        """unit() of each."""
        return [self.example(index, epoch) for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True)]

    def users(self, indices: I64) -> list[str]:
        """The source's names of the users of these examples, each once, in the order of the data."""
        return self._split.users_of(self._targets.rows[indices])

    def collate(self, examples: Sequence[SequenceExample], *, step: int) -> SequenceBatch:
        """One batch, with the negatives of global step `step` where the softmax is sampled; the dummy batch for none."""
        batch = (
            lay_out([example.items for example in examples], [example.targets for example in examples])
            if examples
            else dummy_batch()
        )
        return batch if self._negatives is None else batch.with_negatives(*self._negatives.draw(step))

    def check(self, max_tokens: int) -> None:
        """Raises UserError for a split without targets or a micro-batch that the longest sequence does not fit into."""
        if not len(self._targets):
            raise UserError(
                f"data.path: the split {self._split.name} has no target with an item before it; prepare data with longer sequences"
            )
        if max_tokens < self._shape.max_length:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than a sequence may be (task.sequential.max_length is "
                f"{self._shape.max_length}); raise it or lower task.sequential.max_length"
            )
        longest = int((self._split.offsets[1:] - self._split.offsets[:-1]).max()) - 1
        if self._top_h > self._data.num_items - longest:
            raise UserError(
                f"task.sequential.top_h ({self._top_h}) is more than the longest history leaves: {self._data.num_items} items of the "
                f"catalogue less {longest}; lower it"
            )

    def notes(self) -> list[str]:
        """Which softmax trains, where that is not plain from the keys; keys without effect; whether the data fit the cache."""
        notes = self._data.cache_notes(self._split.name, self.sampler.window)
        if self._negatives is not None:
            notes.append(
                f"the loss is an estimate from {self._num_sampled:,} sampled items of {self._data.num_items:,}, lower on average"
            )
        elif self._num_sampled:
            notes.append(f"task.sequential.num_sampled ({self._num_sampled:,}) covers the catalogue: the softmax is the full one")
        if self._unread:
            keys = ", ".join(self._unread)
            notes.append(f"WARNING: task.kind=sequential trains no language model, so these keys have no effect: {keys}")
        return notes

    def check_module(self, module: nn.Module, score: Callable[[Any], Tensor]) -> None:
        """Nothing to check: the module is ours, and its tests stand in for what a foreign model must show."""

    def step_sums(self) -> Tensor:
        """Nothing."""
        return torch.zeros(0, dtype=torch.float64)

    def end_step(self, sums: Tensor) -> None:
        """Nothing."""

    def save_model(self, weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        """Weights, shape and catalogue into `folder`, read back and compared; with top_h, what that model leaves as a teacher."""
        assert weights, "no trainable weights were gathered: an empty model would be saved"
        model = save_recommender(
            self._shape, {name.removeprefix("model."): value for name, value in weights.items()}, self._data, folder
        )
        if self._top_h:
            self._write_teacher(model, str(next(module.parameters()).device), folder)

    def _write_teacher(self, model: Recommender, device: str, folder: Path) -> None:
        """Rank 0's work while the others wait."""
        embeddings = model.item_embedding.weight.detach().numpy()
        lists = top_items(
            model.to(device),
            self._split,
            num_items=self._shape.num_items,
            max_length=self._shape.max_length,
            top_h=self._top_h,
            device=device,
        )
        write_teacher(
            folder,
            embeddings,
            lists,
            top_h=self._top_h,
            weights=folder / WEIGHTS_NAME,
            data_fingerprint=self._data.manifest.fingerprint,
        )


def build_sequential_task(config: RunConfig, *, split: str = "train") -> SequentialTask:
    """The task on `split` of data.path, checked.

    UserError: a shape that cannot work, a micro-batch too small, no target, or a setting that cannot take effect.
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
            "model.attention=flex has no effect on task.kind=sequential, whose batches have no completion points; set it to auto"
        )
    data = open_data(config.data)
    rows = data.split(split)
    targets = index_targets(rows, settings.max_length)
    task = SequentialTask(
        shape_of(settings, data.num_items),
        data,
        rows,
        targets,
        sampler=GlobalBatchSampler(
            max(len(targets), 1), train.global_batch_size, train.epochs, train.seed, train.max_steps, train.shuffle_window
        ),
        seed=train.seed,
        num_sampled=settings.num_sampled,
        top_h=settings.top_h if split == "train" else 0,
        items=_initial_items(settings, data) if split == "train" else None,
        unread=unread_keys(config),
    )
    task.check(train.max_tokens_per_micro_batch)
    return task


def _initial_items(settings: SequentialConfig, data: PreparedData) -> Tensor | None:
    if settings.init_embeddings is None:
        return None
    folder = Path(settings.init_embeddings)
    return initial_items(folder, data_fingerprint=data.manifest.fingerprint, width=settings.width)
