"""A language model that ranks items, under any method: builds prompts, the scorer and its adapter, and saves what serves.

Everything that is known before the first step is checked here (lengths, catalogue, positions), so that nothing fails at step 900.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.prompts.grouped_prompts import GroupedPromptFactory, build_prompts
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.negatives import NegativeSampler, draw_candidates
from rec_dist.data.sampling.targets import TargetIndex
from rec_dist.errors import UserError
from rec_dist.methods.language_model.builders import check_positions
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.saved_model import save_run_model
from rec_dist.models.assemble import ModelSpec, build_model
from rec_dist.models.scorer import Scorer, check_branching
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts
from rec_dist.runtime.arrays import I32, I64
from rec_dist.runtime.rng import hash_u64

_LISTED = 21  # its own stream of draws


class LanguageTask:
    """Implements tasks.task.Task. Examples are prompts of up to `targets_per_prompt` targets of one user."""

    def __init__(
        self,
        method: Objective,
        model: ModelSpec,
        data: PreparedData,
        split: SequenceSplit,
        targets: TargetIndex,
        builder: PromptBuilder,
        negatives: NegativeSampler,
        *,
        sampler: GlobalBatchSampler,
        refresh_negatives: bool,
        reference_key: str,
        width: int,
    ) -> None:
        self._take_objective(method, model, sampler=sampler, reference_key=reference_key, width=width)
        self._data, self._split, self._targets = data, split, targets
        self._builder, self._negatives = builder, negatives
        self._refresh = refresh_negatives

    def _take_objective(
        self, method: Objective, model: ModelSpec, *, sampler: GlobalBatchSampler, reference_key: str, width: int
    ) -> None:
        self.name = method.name
        self.metric_names = method.metric_names
        self.needs_reference = method.needs_reference
        self.counts_tokens = method.counts_tokens
        self.sampler = sampler
        self.dtype = model.dtype
        self.width = width
        self.reference_key = reference_key
        self._objective, self._model = method, model

    def build_module(self) -> nn.Module:
        """The scorer around the model; call inside the engine's sharded loading. Only the adapter requires gradients, if any."""
        method, spec = self._objective, self._model
        return Scorer(build_model(spec), method.loss, method.metric_names, method.preference, max_tokens=spec.max_tokens)

    def draw_epoch(self, epoch: int) -> int:
        """The epoch that the negatives of `epoch` are drawn for: 0 unless they are refreshed."""
        return epoch if self._refresh else 0

    def example(self, index: int, epoch: int) -> GroupedPrompt:
        """The prompt of example `index` with the negatives of `epoch`."""
        row, start, stop = int(self._targets.rows[index]), int(self._targets.starts[index]), int(self._targets.stops[index])
        offset, items = int(self._split.offsets[row]), self._split.items_of(row)
        begin = max(0, start - self._builder.max_history)
        # A key names a target and the draw of its negatives, so that epochs with other negatives have other references.
        base = self.draw_epoch(epoch) * self._split.num_items + offset
        if self._builder.listed:
            return self._listed_prompt(row, start, items, key=base + start, epoch=epoch)
        groups = [self._completions(row, position, items, epoch) for position in range(start, stop)]
        keys = range(base + start, base + stop)
        return self._builder.grouped_prompt(
            items[begin : stop - 1], groups, keys, branch_at=[p - begin for p in range(start, stop)]
        )

    def examples(self, indices: I64, epochs: I64) -> list[GroupedPrompt]:
        """unit() of each, made all at once where the prompts list no candidates."""
        if self._builder.listed:
            return [self.example(index, epoch) for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True)]
        drawn = np.asarray([self.draw_epoch(epoch) for epoch in epochs.tolist()], dtype=np.int64)
        return build_prompts(self._factory, self._split, self._targets, self._negatives, indices, drawn)

    @cached_property
    def _factory(self) -> GroupedPromptFactory:
        return GroupedPromptFactory(self._builder)

    def _completions(self, row: int, position: int, items: I32, epoch: int) -> I32:
        negatives = self._negatives.draw(
            epoch=self.draw_epoch(epoch),
            user=int(self._split.user_ids[row]),
            position=position,
            seen=items[: position + 1],
            explicit_negatives=self._split.explicit_negatives_of(row),
        )
        return np.concatenate([items[position : position + 1], negatives])

    def _listed_prompt(self, row: int, position: int, items: I32, *, key: int, epoch: int) -> GroupedPrompt:
        target = int(items[position])
        listed = draw_candidates(
            seed=int(hash_u64(self._negatives.seed, _LISTED, self.draw_epoch(epoch)) >> np.uint64(1)),
            user=int(self._split.user_ids[row]),
            position=position,
            target=target,
            history=items[:position],
            num=self._builder.listed,
            num_items=self._data.num_items,
        )
        # The list is in random order, so its first K others are a random choice of them.
        group = np.concatenate([items[position : position + 1], listed[listed != target][: self._negatives.num]])
        history = items[max(0, position - self._builder.max_history) : position]
        return self._builder.grouped_prompt(history, [group], [key], listed=listed)

    def users(self, indices: I64) -> list[str]:
        """The source's names of the users of these examples, each once, in the order of the data."""
        return self._split.users_of(self._targets.rows[indices])

    def collate(self, examples: Sequence[Any], *, step: int) -> PackedBatch:
        """One micro-batch, the same at any step; the dummy batch for none."""
        return pack_prompts(list(examples)) if examples else dummy_batch(self._objective.num_negatives)

    def check(self, max_tokens: int, *, max_positions: int | None) -> None:
        """Raises UserError for a catalogue too small, a micro-batch too small, or prompts longer than the model's positions."""
        if not len(self._targets):
            raise UserError(
                f"data.path: the split {self._split.name} has no target with an item before it; prepare data with longer sequences"
            )
        longest_row = int(np.diff(self._split.offsets).max())
        if not self._builder.listed and self._negatives.num > self._data.num_items - longest_row:
            raise UserError(
                f"negatives.num ({self._negatives.num}) is more than the catalogue allows: {self._data.num_items} items, and one user "
                f"has {longest_row} of them; lower negatives.num to {max(self._data.num_items - longest_row, 0)} or less"
            )
        if self._builder.listed > self._data.num_items - longest_row + 1:
            raise UserError(
                f"prompt.num_candidates ({self._builder.listed}) is more than the catalogue of {self._data.num_items} allows"
            )
        tokens, positions = self._bounds()
        if tokens > max_tokens:  # the bound may be loose; building every planned example is exact, about 20 us each
            longest, user = self._longest_example()
            if longest > max_tokens:
                raise UserError(
                    f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the longest group ({longest} tokens, user {user}); "
                    "raise it or lower prompt.max_history, negatives.num or train.targets_per_prompt"
                )
        check_positions(positions, max_positions)

    def _bounds(self) -> tuple[int, int]:
        """(rows of the longest possible example, positions of the longest possible completion): every title as long as the longest."""
        title = int(self._builder.titles.lengths.max()) + len(self._builder.pieces.item_prefix)
        pieces = vars(self._builder.pieces).values()
        per_prompt_targets = int((self._targets.stops - self._targets.starts).max())
        prompt = sum(len(piece) for piece in pieces) + title * (
            self._builder.max_history + per_prompt_targets - 1 + self._builder.listed
        )
        branch = title + len(self._builder.pieces.end)
        return prompt + per_prompt_targets * (1 + self._negatives.num) * branch, prompt + branch

    def _longest_example(self) -> tuple[int, int]:
        longest, user = 0, -1
        for step in range(self.sampler.num_steps):
            indices, epochs = self.sampler.examples_of_step(step)
            lengths = [example.num_tokens for example in self.examples(indices, epochs)]
            if max(lengths) > longest:
                row = self._targets.rows[indices[int(np.argmax(lengths))]]
                longest, user = max(lengths), int(self._split.user_ids[row])
        return longest, user

    def notes(self) -> list[str]:
        """What the user should know of the data this task is on."""
        notes = self._data.cache_notes(self._split.name, self.sampler.window)
        if self._negatives.kind == "low_rated":
            short = int((np.diff(self._split.explicit_negative_offsets) < self._negatives.num).sum())
            notes.append(
                f"WARNING: negatives.kind=low_rated: {short:,} of {len(self._split):,} users have fewer than {self._negatives.num} "
                "items rated below data.min_rating; uniform negatives fill up"
            )
        return notes

    def check_module(self, module: nn.Module, score: Callable[[PackedBatch], Tensor]) -> None:
        """Raises UserError when the model's attention does not keep to the mask. score: batch -> (N,) log-probs."""
        check_branching(score, vocab_size=int(module._base[0].config.vocab_size), dtype=self._model.dtype)  # type: ignore[index,union-attr]

    def save_model(self, weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        """As tasks.saved.save_run_model."""
        save_run_model(weights, module, self._model, self._builder, self._data, folder)

    def step_sums(self) -> Tensor:
        """Nothing."""
        return torch.zeros(0, dtype=torch.float64)

    def end_step(self, sums: Tensor) -> None:
        """Nothing."""
