"""Interactions as examples of retrieval: a prompt over a user's items, with up to train.targets_per_prompt targets.

Unlike prompts that score titles, these end with the title before the last target: the vectors of the items answer, so a target
costs no row of its own. Every epoch has the same examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.item_sampler import ItemSampler
from rec_dist.data.sampling.targets import TargetIndex
from rec_dist.errors import UserError
from rec_dist.methods.language_model.limits import check_positions
from rec_dist.methods.retrieval.batch import RetrievalBatch, RetrievalExample, dummy_batch, pack_retrieval
from rec_dist.packing.sizes import OneByOne, Sizes
from rec_dist.runtime.arrays import I32, I64


@dataclass(frozen=True)
class TitlePrompts:
    """Prompts that end with a title. pooling: `mean` of the states of a title's tokens, or the state of its `last` one."""

    builder: PromptBuilder
    pooling: str

    def tokens(self, items: I32) -> I32:
        """The prompt over `items`, (P,)."""
        return self.builder.prompt(items)[: -len(self.builder.pieces.tail)]

    def spans(self, items: I32) -> I64:
        """The rows of each title in that prompt that are pooled, first and end: (n, 2)."""
        lengths = self.builder.titles.lengths[items]
        ends = len(self.builder.pieces.begin) + np.cumsum(lengths + len(self.builder.pieces.item_prefix))
        return np.stack([ends - (lengths if self.pooling == "mean" else 1), ends], axis=1)

    def lengths(self, histories: I32, offsets: I64) -> I64:
        """(U,): the tokens of the prompt over each of U histories, those of u at offsets (U+1,)."""
        return self.builder.prompt_lengths(histories, offsets) - len(self.builder.pieces.tail)


@dataclass(frozen=True)
class RetrievalExamples:
    """Implements methods.task.TaskData. negatives: where the softmax is sampled; None where it is the full one."""

    prepared: PreparedData
    split: SequenceSplit
    targets: TargetIndex
    prompts: TitlePrompts
    negatives: ItemSampler | None

    def example(self, index: int) -> RetrievalExample:
        """Build the prompt of example `index`: its first target sees up to prompt.max_history items, the others also what follows."""
        row, start, stop = int(self.targets.rows[index]), int(self.targets.starts[index]), int(self.targets.stops[index])
        items = self.split.items_of(row)[:stop]
        shown = items[max(0, start - self.prompts.builder.max_history) : stop - 1]
        return RetrievalExample(items, start, self.prompts.tokens(shown), self.prompts.spans(shown)[start - stop :])

    def draw(self, indices: I64, epochs: I64) -> OneByOne:
        """Nothing is drawn before a batch is laid out; every epoch has the same prompts."""
        rows, starts, stops = self.targets.rows[indices], self.targets.starts[indices], self.targets.stops[indices]
        shown = stops - 1 - np.maximum(0, starts - self.prompts.builder.max_history)
        items = self.split.take(rows, stops)[runs(offsets_of(stops)[1:] - 1 - shown, shown)]
        tokens, targets = self.prompts.lengths(items, offsets_of(shown)), stops - starts
        return OneByOne(Sizes(tokens, targets, targets, tokens), lambda place: self.example(int(indices[place])))

    def collate(self, examples: Sequence[RetrievalExample], *, step: int) -> RetrievalBatch:
        """Pack one micro-batch, with step `step`'s negatives if the softmax is sampled; without examples, the dummy batch."""
        negatives = None if self.negatives is None else self.negatives.draw(step)
        if not examples:
            return dummy_batch(negatives)
        return pack_retrieval(examples, num_items=self.prepared.num_items, negatives=negatives)

    def users(self, indices: I64) -> list[int]:
        """Return the numbers of the users in these examples, each once, in the order of the data."""
        return self.split.users_of(self.targets.rows[indices])

    def check(self, sampler: GlobalBatchSampler, *, max_tokens: int, max_positions: int | None) -> None:
        """Raises UserError for a split without targets, a micro-batch too small, or prompts longer than the model takes."""
        if not len(self.targets):
            raise UserError(
                f"data.path: the split {self.split.name} has no target with an item before it; prepare data with longer sequences"
            )
        longest = self._longest(sampler, max_tokens)
        if longest > max_tokens:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the longest prompt ({longest} tokens); "
                "raise it or lower prompt.max_history or train.targets_per_prompt"
            )
        check_positions(longest, max_positions)

    def _longest(self, sampler: GlobalBatchSampler, max_tokens: int) -> int:
        """Tokens of the longest prompt: a bound from the longest title, or the exact number if the bound exceeds max_tokens."""
        builder = self.prompts.builder
        shown = int((self.targets.stops - 1 - np.maximum(0, self.targets.starts - builder.max_history)).max())
        title = int(builder.titles.lengths.max()) + len(builder.pieces.item_prefix)
        bound = len(builder.pieces.begin) + shown * title
        if bound <= max_tokens:
            return bound
        steps = (sampler.examples_of_step(step) for step in range(sampler.num_steps))
        return max(int(self.draw(indices, epochs).sizes.num_tokens.max()) for indices, epochs in steps)
