"""SASRec as a task: next-item prediction on ids, the baseline beside every language model and the teacher of some.

A unit is a run of up to max_length neighbouring targets of one user with the items before them. A row longer than that makes
several units, so no target is dropped, and each is scored once an epoch.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset import PreparedData, SequenceSplit
from rec_dist.data.plan import Order
from rec_dist.data.schema import ITEMS_NAME
from rec_dist.data.targets import TargetIndex, index_targets
from rec_dist.models.sasrec import SASRec, SASRecShape, SequenceBatch, lay_out, stand_in
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.files import write_json
from rec_dist.stream.trunk import I32, I64

WEIGHTS_NAME, SHAPE_NAME = "model.safetensors", "sequential.json"


@dataclass(frozen=True)
class SequenceUnit:
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
        self, shape: SASRecShape, data: PreparedData, split: SequenceSplit, targets: TargetIndex, *, order: Order, seed: int
    ) -> None:
        self.order = order
        self.width = shape.width
        self._shape, self._data, self._split, self._targets, self._seed = shape, data, split, targets, seed

    def draw_epoch(self, epoch: int) -> int:
        """0: a unit draws nothing."""
        return 0

    def build_module(self) -> nn.Module:
        """SASRec with initial weights that are a function of the seed alone; the caller's generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return SASRec(self._shape)

    def unit(self, index: int, epoch: int) -> SequenceUnit:
        """The run of targets of unit `index`, after as many of the items before them as max_length leaves room for."""
        row, start, stop = int(self._targets.rows[index]), int(self._targets.starts[index]), int(self._targets.stops[index])
        items = self._split.items_of(row)
        return SequenceUnit(items[max(0, stop - 1 - self._shape.max_length) : stop - 1], items[start:stop])

    def units(self, indices: I64, epochs: I64) -> list[SequenceUnit]:
        """unit() of each."""
        return [self.unit(index, epoch) for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True)]

    def users(self, indices: I64) -> list[str]:
        """The source's names of the users of these units, each once, in the order of the data."""
        return [self._split.raw_user(row) for row in np.unique(self._targets.rows[indices]).tolist()]

    def collate(self, units: Sequence[SequenceUnit]) -> SequenceBatch:
        """One batch; the stand-in for none."""
        return lay_out([unit.items for unit in units], [unit.targets for unit in units]) if units else stand_in()

    def check(self, tokens_per_pack: int) -> None:
        """Raises UserError for a split without targets or a pack that the longest sequence does not fit into."""
        if not len(self._targets):
            raise UserError(
                "data.path: the training split has no target with an item before it; prepare data with longer sequences"
            )
        if tokens_per_pack < self._shape.max_length:
            raise UserError(
                f"train.tokens_per_pack ({tokens_per_pack}) is smaller than a sequence may be (task.sequential.max_length is "
                f"{self._shape.max_length}); raise it or lower task.sequential.max_length"
            )

    def notes(self) -> list[str]:
        """Nothing to tell."""
        return []

    def check_module(self, module: nn.Module, score: Callable[[Any], Tensor]) -> None:
        """Nothing to check: the module is ours, and its tests stand in for what a foreign model must show."""

    def save_model(self, weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        """Weights, shape and catalogue into `folder`; what is written is read back and compared."""
        assert weights, "no trainable weights were gathered: an empty model would be saved"
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(folder / SHAPE_NAME, {"shape": self._shape.as_dict(), "data_fingerprint": self._data.manifest.fingerprint})
        shutil.copyfile(self._data.path / ITEMS_NAME, folder / ITEMS_NAME)
        read_back = load_sasrec(folder).state_dict()
        assert all(torch.equal(read_back[name], value) for name, value in weights.items()), folder


def build_sequential_task(config: RunConfig) -> SequentialTask:
    """The task on the training split of data.path, checked.

    UserError: a width that the heads do not divide, a pack too small, no target, or a setting that cannot take effect.
    """
    settings, train = config.task.sequential, config.train
    if settings.width % settings.num_heads:
        raise UserError(
            f"task.sequential.width ({settings.width}) is not a multiple of task.sequential.num_heads ({settings.num_heads}); "
            "change one of them"
        )
    if train.init_from is not None:
        raise UserError(f"train.init_from ({train.init_from}) has no effect on task.kind=sequential; remove it")
    if train.targets_per_trunk != 1:
        raise UserError(
            f"train.targets_per_trunk ({train.targets_per_trunk}) has no effect on task.kind=sequential, which scores every "
            "position of a sequence; remove it"
        )
    if config.model.dtype == "bfloat16":
        raise UserError("model.dtype=bfloat16 has no effect on task.kind=sequential, which is float32; set model.dtype=auto")
    if config.model.attention == "flex":
        raise UserError("model.attention=flex has no effect on task.kind=sequential, whose batches have no forks; set it to auto")
    data = PreparedData.open(config.data.path)
    split = data.split("train")
    targets = index_targets(split, settings.max_length)
    task = SequentialTask(
        SASRecShape(num_items=data.num_items, **settings.model_dump()),
        data,
        split,
        targets,
        order=Order(max(len(targets), 1), train.groups_per_step, train.epochs, train.seed, train.max_steps),
        seed=train.seed,
    )
    task.check(train.tokens_per_pack)
    return task


def load_sasrec(folder: Path) -> SASRec:
    """The model that save_model wrote into `folder`, on the CPU, in evaluation mode.

    UserError: no such model there, or weights of another shape.
    """
    if not (folder / SHAPE_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
        raise UserError(f"{folder} holds no sequential model ({SHAPE_NAME} and {WEIGHTS_NAME}); let its run finish first")
    try:
        shape = SASRecShape(**json.loads((folder / SHAPE_NAME).read_text(encoding="utf-8"))["shape"])
        with torch.random.fork_rng(devices=[]):
            model = SASRec(shape)
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except (ValueError, KeyError, TypeError, RuntimeError) as fault:
        raise UserError(f"{folder} holds a damaged sequential model ({' '.join(str(fault).split())}); train it again") from fault
    return model.eval()


def check_catalogue(folder: Path, data: PreparedData) -> None:
    """UserError: the model in `folder` was trained on another data set than `data`, so its item ids mean other items."""
    saved = json.loads((folder / SHAPE_NAME).read_text(encoding="utf-8")).get("data_fingerprint")
    if saved != data.manifest.fingerprint:
        raise UserError(
            f"the model in {folder} was trained on another data set than {data.path}; its item ids mean other items there"
        )
