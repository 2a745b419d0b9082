"""The examples of a sequential recommender: runs of neighbouring targets, with the items before them and a teacher's lists.

n items that an example reads, m targets of it, h items of a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.sampling.item_sampler import ItemSampler
from rec_dist.data.sampling.targets import TargetIndex
from rec_dist.errors import UserError
from rec_dist.methods.sequential.sequences import SequenceBatch, dummy_batch, lay_out
from rec_dist.methods.sequential.soft_targets import SoftTargets
from rec_dist.packing.sizes import OneByOne, Sizes
from rec_dist.runtime.arrays import F32, I32, I64


@dataclass(frozen=True)
class SequenceExample:
    """items (n,) int32: what the model reads; targets (m <= n,) int32: what follows its last m positions.

    lists: a teacher's items and shares at each target, (m, h) both; None without a teacher.
    """

    items: I32
    targets: I32
    lists: tuple[I32, F32] | None = None

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
    """Implements methods.task.TaskData. negatives: where the softmax is sampled; None where it is the full one.

    teacher: soft targets of some of the split's targets; None without a teacher.
    """

    prepared: PreparedData
    split: SequenceSplit
    targets: TargetIndex
    max_length: int
    negatives: ItemSampler | None
    teacher: SoftTargets | None = None

    def example(self, index: int) -> SequenceExample:
        """Build the run of targets of example `index`, after as many of the items before them as max_length leaves room for."""
        row, start, stop = int(self.targets.rows[index]), int(self.targets.starts[index]), int(self.targets.stops[index])
        items = self.split.items_of(row)
        begin = int(self.split.offsets[row])
        lists = None if self.teacher is None else self.teacher.of(begin + start, begin + stop)
        return SequenceExample(items[max(0, stop - 1 - self.max_length) : stop - 1], items[start:stop], lists)

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
        if self.teacher is not None:  # the dummy batch has lists, too, so that every rank makes the same calls
            lists = [example.lists for example in examples if example.lists is not None] or [self.teacher.none(len(batch.rows))]
            batch = batch.with_lists(
                np.concatenate([items for items, _ in lists]), np.concatenate([shares for _, shares in lists])
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
