"""Interactions as examples of a language model: prompts of up to `train.targets_per_prompt` targets of one user, with negatives.

`check` finds every fault that can be known before the first step, so that nothing fails at step 900.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.prompts.grouped_prompts import DrawnPrompts, GroupedPromptFactory
from rec_dist.data.prompts.groups import Groups, draw_groups, draw_listed_groups
from rec_dist.data.prompts.title_trie import catalogue_packing
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.negatives import NegativeSampler, draw_candidates
from rec_dist.data.sampling.targets import TargetIndex
from rec_dist.errors import UserError
from rec_dist.methods.language_model.limits import check_positions
from rec_dist.methods.language_model.objective import Margins
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts
from rec_dist.runtime.arrays import F32, I32, I64
from rec_dist.runtime.rng import hash_u64

_LISTED = 21  # its own stream of draws


@dataclass(frozen=True)
class InteractionExamples:
    """Implements methods.task.TaskData.

    refresh_negatives: every epoch draws other negatives. margins, temperature: as in Objective.
    """

    prepared: PreparedData
    split: SequenceSplit
    targets: TargetIndex
    builder: PromptBuilder
    negatives: NegativeSampler
    refresh_negatives: bool
    margins: Margins | None = None
    temperature: float | None = None

    def draw_epoch(self, epoch: int) -> int:
        """Return the epoch that the negatives of `epoch` are drawn for: 0 unless they are refreshed."""
        return epoch if self.refresh_negatives else 0

    def example(self, index: int, epoch: int) -> GroupedPrompt:
        """Build the prompt of example `index` with the negatives of `epoch`."""
        row, start, stop = int(self.targets.rows[index]), int(self.targets.starts[index]), int(self.targets.stops[index])
        offset, items = int(self.split.offsets[row]), self.split.items_of(row)
        begin = max(0, start - self.builder.max_history)
        # A key names a target and the draw of its negatives, so epochs with other negatives have other references.
        base = self.draw_epoch(epoch) * self.split.num_items + offset
        if self.builder.listed:
            return self._listed_prompt(row, start, items, key=base + start, epoch=epoch)
        groups = [self._completions(row, position, items, epoch) for position in range(start, stop)]
        keys = range(base + start, base + stop)
        branch_at = [position - begin for position in range(start, stop)]
        prompt = self.builder.grouped_prompt(items[begin : stop - 1], groups, keys, branch_at=branch_at)
        return self._with_margins(prompt, np.stack(groups))

    def draw(self, indices: I64, epochs: I64) -> DrawnPrompts:
        """Draw the negatives or candidates of each, all at once; what is built equals example()."""
        draws = epochs if self.refresh_negatives else np.zeros_like(epochs)
        most = self.builder.max_history
        if not self.builder.listed:
            groups = draw_groups(self.split, self.targets, self.negatives, indices, draws, max_history=most)
            return DrawnPrompts(self._factory, groups, self._margins_of)
        groups = draw_listed_groups(
            self.split,
            self.targets,
            indices,
            draws,
            seeds=(hash_u64(self.negatives.seed, _LISTED, draws) >> np.uint64(1)).astype(np.int64),
            num_listed=self.builder.listed,
            num_negatives=self.negatives.num,
            num_items=self.prepared.num_items,
            max_history=most,
        )
        return DrawnPrompts(self._factory, groups, self._margins_of)

    @cached_property
    def _factory(self) -> GroupedPromptFactory:
        return GroupedPromptFactory(self.builder)

    def _completions(self, row: int, position: int, items: I32, epoch: int) -> I32:
        negatives = self.negatives.draw(
            epoch=self.draw_epoch(epoch),
            user=int(self.split.user_ids[row]),
            position=position,
            seen=items[: position + 1],
            explicit_negatives=self.split.explicit_negatives_of(row),
        )
        return np.concatenate([items[position : position + 1], negatives])

    def _listed_prompt(self, row: int, position: int, items: I32, *, key: int, epoch: int) -> GroupedPrompt:
        target = int(items[position])
        listed = draw_candidates(
            seed=int(hash_u64(self.negatives.seed, _LISTED, self.draw_epoch(epoch)) >> np.uint64(1)),
            user=int(self.split.user_ids[row]),
            position=position,
            target=target,
            history=items[:position],
            num=self.builder.listed,
            num_items=self.prepared.num_items,
        )
        # The list is in random order, so its first K other items are a random choice of them.
        group = np.concatenate([items[position : position + 1], listed[listed != target][: self.negatives.num]])
        history = items[max(0, position - self.builder.max_history) : position]
        return self._with_margins(self.builder.grouped_prompt(history, [group], [key], listed=listed), group[None])

    def _with_margins(self, prompt: GroupedPrompt, completions: I32) -> GroupedPrompt:
        """completions: (G, 1 + K) item ids."""
        if self.margins is None:
            return prompt
        return replace(prompt, margins=self.margins(self.split, prompt.keys, completions).reshape(-1))

    @property
    def _margins_of(self) -> Callable[[Groups], F32] | None:
        margins, split = self.margins, self.split
        return None if margins is None else lambda groups: margins(split, groups.keys, groups.completions)

    def collate(self, examples: Sequence[Any], *, step: int) -> PackedBatch:
        """Pack one micro-batch, the same at any step; without examples, the dummy batch."""
        return self.pack(list(examples)) if examples else dummy_batch(self.negatives.num)

    @cached_property
    def pack(self) -> Callable[[list[GroupedPrompt]], PackedBatch]:
        """Prompts -> the batch that the head takes."""
        return pack_prompts if self.temperature is None else catalogue_packing(self.builder, self.temperature)

    def users(self, indices: I64) -> list[int]:
        """Return the numbers of the users in these examples, each once, in the order of the data."""
        return self.split.users_of(self.targets.rows[indices])

    def notes(self, sampler: GlobalBatchSampler) -> list[str]:
        """Say whether the data fits the cache, and how many users lack explicit negatives."""
        notes = self.prepared.cache_notes(self.split.name, sampler.window)
        if self.negatives.kind == "low_rated":
            short = int((np.diff(self.split.explicit_negative_offsets) < self.negatives.num).sum())
            notes.append(
                f"WARNING: negatives.kind=low_rated: {short:,} of {len(self.split):,} users have fewer than "
                f"{self.negatives.num} items rated below data.min_rating; uniform negatives fill up"
            )
        return notes

    def check(self, sampler: GlobalBatchSampler, *, max_tokens: int, max_positions: int | None) -> None:
        """Raises UserError for a catalogue too small, a micro-batch too small, or prompts longer than the model's positions."""
        if not len(self.targets):
            raise UserError(
                f"data.path: the split {self.split.name} has no target with an item before it; prepare data with longer sequences"
            )
        longest_row = int(np.diff(self.split.offsets).max())
        num_items = self.prepared.num_items - len(self.negatives.held_out)
        if not self.builder.listed and self.negatives.num > num_items - longest_row:
            raise UserError(
                f"negatives.num ({self.negatives.num}) is more than the catalogue allows: {num_items} items, and "
                f"one user has {longest_row} of them; lower negatives.num to {max(num_items - longest_row, 0)} or less"
            )
        if self.builder.listed > self.prepared.num_items - longest_row + 1:
            raise UserError(
                f"prompt.num_candidates ({self.builder.listed}) is more than the catalogue of {self.prepared.num_items} allows"
            )
        tokens, positions = self._bounds()
        if tokens > max_tokens:  # the bound may be loose; drawing every planned example is exact, about 10 us each
            longest, user = self._longest_example(sampler)
            if longest > max_tokens:
                raise UserError(
                    f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the longest group ({longest} tokens, "
                    f"user {user}); raise it or lower prompt.max_history, negatives.num or train.targets_per_prompt"
                )
        check_positions(positions, max_positions)

    def _bounds(self) -> tuple[int, int]:
        """(rows of an example, positions of a completion) if every title were as long as the longest."""
        title = int(self.builder.titles.lengths.max()) + len(self.builder.pieces.item_prefix)
        pieces = vars(self.builder.pieces).values()
        per_prompt_targets = int((self.targets.stops - self.targets.starts).max())
        prompt = sum(len(piece) for piece in pieces) + title * (
            self.builder.max_history + per_prompt_targets - 1 + self.builder.listed
        )
        branch = title + len(self.builder.pieces.end)
        return prompt + per_prompt_targets * (1 + self.negatives.num) * branch, prompt + branch

    def _longest_example(self, sampler: GlobalBatchSampler) -> tuple[int, int]:
        longest, user = 0, -1
        for step in range(sampler.num_steps):
            indices, epochs = sampler.examples_of_step(step)
            lengths = self.draw(indices, epochs).sizes.num_tokens
            if lengths.max() > longest:
                row = self.targets.rows[indices[int(lengths.argmax())]]
                longest, user = int(lengths.max()), int(self.split.user_ids[row])
        return longest, user
