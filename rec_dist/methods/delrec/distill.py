"""DELRec's stage 1 (arXiv 2406.11156): what a sequential recommender does, distilled into soft prompts before a frozen language model.

At every training position two prompts are answered (methods/delrec/prompts.py): Temporal Analysis and Recommendation Pattern Simulating.

  L = w_T * CE_T + w_P * CE_P,   w_i = (1 / |g_i|) ** 0.5, normalised to sum 1,

CE over the m candidates' whole-title log-likelihoods, g_i the gradient of objective i on the soft prompt. Decided: g_i is that of
the global batch of the step before (both weights 1/2 in the first), so no pass is made twice: each objective has its own token ids
for the same vectors, hence its own gradient rows in the backward pass that is made anyway. They are summed over ranks with the step's
sums. The weights are in every checkpoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.sampling.targets import TargetIndex
from rec_dist.errors import UserError
from rec_dist.losses import LossSums
from rec_dist.methods.delrec.choice import choice_loss
from rec_dist.methods.delrec.config import DelrecConfig
from rec_dist.methods.delrec.prompts import FIRST_POSITION, PATTERN, TEMPORAL, DistillPrompts, Place
from rec_dist.methods.language_model.builders import build_batch_sampler, check_positions
from rec_dist.methods.language_model.saved_model import save_run_model
from rec_dist.models.assemble import ModelSpec, build_model
from rec_dist.models.scorer import Scorer, check_branching
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts
from rec_dist.runtime.arrays import I32, I64

_OBJECTIVES = {"both": (TEMPORAL, PATTERN), "temporal": (TEMPORAL,), "pattern": (PATTERN,)}


def items_shown(settings: DelrecConfig) -> list[int]:
    """How many items the prompt of each objective shows beside the history: an example and t_1, or t_2 .. t_h."""
    return [3 if objective == TEMPORAL else settings.top_h - 1 for objective in _OBJECTIVES[settings.objectives]]


class WeightedChoices(nn.Module):
    """The loss: each group's choice, weighted by its objective, which the lowest bit of its key names."""

    changing_buffers = ("weights",)  # goes into checkpoints
    metric_names = ("loss/temporal", "loss/pattern", "weight/temporal")
    weights: Tensor  # (2,)

    def __init__(self, objectives: tuple[int, ...]) -> None:
        super().__init__()
        self._num_objectives = len(objectives)
        weights = torch.zeros(2)
        weights[list(objectives)] = 1 / len(objectives)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logps: Tensor, batch: PackedBatch) -> LossSums:
        """Sums over the examples of a micro-batch; a example has one group of each objective."""
        objective = batch.keys & 1  # (G,)
        loss = choice_loss(logps, batch, group_weights=batch.weights * self.weights.to(batch.weights)[objective]).loss_sum
        count = batch.weights.sum() / self._num_objectives
        with torch.no_grad():
            parts = [choice_loss(logps, batch, group_weights=batch.weights * (objective == i)).loss_sum for i in (0, 1)]
        return LossSums(loss, count, dict(zip(self.metric_names, (*parts, count * self.weights[TEMPORAL]), strict=True)))

    def balance(self, gradients: Tensor) -> None:
        """gradients (2, n, D) of the step that was: of each objective times its weight. Sets the next step's weights.

        Left as they are where a norm is 0 or not finite.
        """
        norms = gradients.flatten(1).norm(dim=1) / self.weights.to(gradients)
        if bool(torch.isfinite(norms).all() and (norms > 0).all()):
            inverse = norms**-0.5
            self.weights = (inverse / inverse.sum()).float().to(self.weights.device)


@dataclass(frozen=True)
class DistillExample:
    """One training position: a prompt for each objective. It counts as one group, so that a step's loss is a mean over positions."""

    prompts: tuple[GroupedPrompt, ...]
    num_groups: int = 1

    @property
    def num_tokens(self) -> int:
        """Rows."""
        return sum(prompt.num_tokens for prompt in self.prompts)

    @property
    def num_scored(self) -> int:
        """Scored tokens."""
        return sum(prompt.num_scored for prompt in self.prompts)

    @property
    def num_logical_tokens(self) -> int:
        """Tokens with every prompt written out before each completion."""
        return sum(prompt.num_logical_tokens for prompt in self.prompts)


class DelrecDistillTask:
    """Implements tasks.task.Task. lists(example) -> (h,): the teacher's list at a example's position."""

    name = "delrec_distill"
    metric_names: tuple[str, ...] = WeightedChoices.metric_names
    needs_reference = False
    counts_tokens = False
    reference_key = ""

    def __init__(
        self,
        spec: ModelSpec,
        data: PreparedData,
        split: SequenceSplit,
        targets: TargetIndex,
        builder: PromptBuilder,
        prompts: DistillPrompts,
        lists: Callable[[int], I32],
        config: RunConfig,
        width: int,
    ) -> None:
        self.sampler = build_batch_sampler(config, max(len(targets), 1))
        self.dtype, self.width = spec.dtype, width
        self._spec, self._data, self._split, self._targets = spec, data, split, targets
        self._builder, self._prompts, self._lists = builder, prompts, lists
        settings = config.task.section(DelrecConfig)
        self._objectives, self._top_h = _OBJECTIVES[settings.objectives], settings.top_h
        self._num_negatives, self._refresh = config.negatives.num, config.negatives.refresh_each_epoch

    def build_module(self) -> nn.Module:
        """The scorer; only the soft prompt requires gradients."""
        loss = WeightedChoices(self._objectives)
        self._scorer = Scorer(build_model(self._spec), loss, self.metric_names, max_tokens=self._spec.max_tokens)
        return self._scorer

    def draw_epoch(self, epoch: int) -> int:
        """The epoch that the candidates of `epoch` are drawn for."""
        return epoch if self._refresh else 0

    def place(self, index: int, epoch: int) -> Place:
        """What the prompts of example `index` may know."""
        row, position = int(self._targets.rows[index]), int(self._targets.starts[index])
        key = self.draw_epoch(epoch) * self._split.num_items + int(self._split.offsets[row]) + position
        before = self._split.items_of(row)[:position]
        return Place(int(self._split.user_ids[row]), position, self.draw_epoch(epoch), before, self._lists(index), key)

    def example(self, index: int, epoch: int) -> DistillExample:
        """The prompts of example `index` with the candidates of `epoch`."""
        at = self.place(index, epoch)
        build = {TEMPORAL: self._prompts.temporal, PATTERN: self._prompts.pattern}
        return DistillExample(tuple(build[objective](at) for objective in self._objectives))

    def examples(self, indices: I64, epochs: I64) -> list[DistillExample]:
        """unit() of each."""
        return [self.example(index, epoch) for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True)]

    def users(self, indices: I64) -> list[str]:
        """The source's names of the users of these examples, each once, in the order of the data."""
        return self._split.users_of(self._targets.rows[indices])

    def collate(self, examples: Sequence[DistillExample], *, step: int) -> PackedBatch:
        """One micro-batch, the same at any step; the dummy batch for none."""
        return (
            pack_prompts([prompt for example in examples for prompt in example.prompts])
            if examples
            else dummy_batch(self._num_negatives)
        )

    def notes(self) -> list[str]:
        """How many positions are left out."""
        own = f"positions with fewer than {FIRST_POSITION} items before them have no example to show and are left out"
        return [*self._data.cache_notes(self._split.name, self.sampler.window), own]

    def check(self, max_tokens: int, *, max_positions: int | None) -> None:
        """Raises UserError for data without positions, a catalogue or a micro-batch too small, or prompts longer than the model takes."""
        if not len(self._targets):
            raise UserError(f"data.path: no training row has a target after {FIRST_POSITION} items; prepare longer sequences")
        free = self._data.num_items - int(np.diff(self._split.offsets).max())
        if max(self._num_negatives + 1, self._top_h) > free:
            raise UserError(
                f"negatives.num ({self._num_negatives}) is more than the catalogue allows: {free} of {self._data.num_items} items are "
                "outside the longest history; lower it"
            )
        bounds = [self._prompts.longest(objective, self._top_h) for objective in self._objectives]
        tokens, positions = sum(rows for rows, _ in bounds), max(last for _, last in bounds)
        if tokens > max_tokens:  # the bound may be loose
            steps = (self.examples(*self.sampler.examples_of_step(step)) for step in range(self.sampler.num_steps))
            tokens = max(example.num_tokens for examples in steps for example in examples)
        if tokens > max_tokens:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the longest pair of prompts ({tokens} tokens); raise it "
                "or lower prompt.max_history or negatives.num"
            )
        check_positions(positions, max_positions)

    def check_module(self, module: nn.Module, score: Callable[[PackedBatch], Tensor]) -> None:
        """As tasks.language.LanguageTask.check_module."""
        check_branching(score, vocab_size=int(module._base[0].config.vocab_size), dtype=self.dtype)  # type: ignore[index,union-attr]

    def step_sums(self) -> Tensor:
        """Each objective's gradient on the soft prompt, (2 n D,); (0,) where one trains alone."""
        gradients: Tensor = self._scorer._base[0].get_input_embeddings().take_gradients()
        return gradients.flatten() if len(self._objectives) == 2 else torch.zeros(0, dtype=torch.float64)

    def end_step(self, sums: Tensor) -> None:
        """Weighs the objectives of the next step."""
        if len(sums):
            self._scorer.loss.balance(sums.view(2, -1, self.width))  # type: ignore[attr-defined]

    def save_model(self, weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        """The soft prompt, as tasks.saved.save_run_model."""
        save_run_model(weights, module, self._spec, self._builder, self._data, folder)
