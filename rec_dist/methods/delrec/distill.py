"""DELRec's stage 1 (arXiv 2406.11156): distil a sequential recommender into soft prompts before a frozen language model.

At every training position the model answers two prompts (methods/delrec/prompts.py): Temporal Analysis and
Recommendation Pattern Simulating.

  L = w_T * CE_T + w_P * CE_P,   w_i = (1 / |g_i|) ** 0.5, normalised to sum 1,

CE is over the m candidates' whole-title log-likelihoods, and g_i is the gradient of objective i on the soft prompt. We
take g_i from the global batch of the step before (both weights are 1/2 in the first step), so that no pass is made
twice: each objective has its own token ids for the same vectors, and thus its own gradient rows in the backward pass
that is made anyway. The rows are summed over ranks in the step's reduction. The weights are in every checkpoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.targets import TargetIndex
from rec_dist.errors import UserError
from rec_dist.losses import LossSums
from rec_dist.methods.delrec.choice import choice_loss
from rec_dist.methods.delrec.config import DelrecConfig
from rec_dist.methods.delrec.prompts import FIRST_POSITION, PATTERN, TEMPORAL, DistillPrompts, Place, Places
from rec_dist.methods.language_model.limits import check_positions
from rec_dist.methods.language_model.saved_model import save_run_model
from rec_dist.methods.task import Exchange, NoExchange, Score, Task, TaskModel
from rec_dist.models.assemble import ModelSpec, build_model
from rec_dist.models.scorer import Scorer, check_scorer
from rec_dist.models.soft_prompt import SoftPromptEmbedding
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts
from rec_dist.packing.sizes import OneByOne, Sizes
from rec_dist.runtime.arrays import I32, I64

OBJECTIVES = {"both": (TEMPORAL, PATTERN), "temporal": (TEMPORAL,), "pattern": (PATTERN,)}


def items_shown(settings: DelrecConfig) -> list[int]:
    """Return how many items each objective's prompt shows beside the history: an example and t_1, or t_2 .. t_h."""
    return [3 if objective == TEMPORAL else settings.top_h - 1 for objective in OBJECTIVES[settings.objectives]]


class WeightedChoices(nn.Module):
    """The loss: each group's choice, weighted by the group's objective. The lowest bit of a group's key names the objective."""

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
        """Sum over the examples of a micro-batch; an example has one group for each objective."""
        objective = batch.keys & 1  # (G,)
        loss = choice_loss(logps, batch, group_weights=batch.weights * self.weights.to(batch.weights)[objective]).loss_sum
        count = batch.weights.sum() / self._num_objectives
        with torch.no_grad():
            parts = [choice_loss(logps, batch, group_weights=batch.weights * (objective == i)).loss_sum for i in (0, 1)]
        return LossSums(loss, count, dict(zip(self.metric_names, (*parts, count * self.weights[TEMPORAL]), strict=True)))

    def balance(self, gradients: Tensor) -> None:
        """Set the next step's weights. gradients (2, n, D): of each objective in this step, times its weight.

        The weights stay as they are when a norm is 0 or not finite.
        """
        norms = gradients.flatten(1).norm(dim=1) / self.weights.to(gradients)
        inverse = norms**-0.5
        usable = (torch.isfinite(norms) & (norms > 0)).all()  # not read here, since the host would wait for it
        self.weights = torch.where(usable, (inverse / inverse.sum()).to(self.weights), self.weights)


@dataclass(frozen=True)
class DistillExample:
    """One training position: a prompt for each objective. It counts as one group, so a step's loss is a mean over positions."""

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


@dataclass(frozen=True)
class DistillExamples:
    """Implements methods.task.TaskData. lists(indices (U,)) -> (U, h): the teacher's lists at the positions of these examples."""

    prepared: PreparedData
    split: SequenceSplit
    targets: TargetIndex
    builder: PromptBuilder
    prompts: DistillPrompts
    lists: Callable[[I64], I32]
    objectives: tuple[int, ...]
    num_negatives: int
    refresh_negatives: bool

    def draw_epoch(self, epoch: int) -> int:
        """Return the epoch that the candidates of `epoch` are drawn for."""
        return epoch if self.refresh_negatives else 0

    def place(self, index: int, epoch: int) -> Place:
        """Return what the prompts of example `index` may know."""
        row, position = int(self.targets.rows[index]), int(self.targets.starts[index])
        key = self.draw_epoch(epoch) * self.split.num_items + int(self.split.offsets[row]) + position
        before = self.split.items_of(row)[:position]
        return Place(
            int(self.split.user_ids[row]), position, self.draw_epoch(epoch), before, self.lists(np.asarray([index]))[0], key
        )

    def example(self, index: int, epoch: int) -> DistillExample:
        """Build the prompts of example `index` with the candidates of `epoch`."""
        at = self.place(index, epoch)
        build = {TEMPORAL: self.prompts.temporal, PATTERN: self.prompts.pattern}
        return DistillExample(tuple(build[objective](at) for objective in self.objectives))

    def draw(self, indices: I64, epochs: I64) -> OneByOne:
        """Draw the candidates of each, all at once."""
        rows, positions = self.targets.rows[indices], self.targets.starts[indices]
        at = Places(
            users=self.split.user_ids[rows],
            epochs=epochs if self.refresh_negatives else np.zeros_like(epochs),
            before=self.split.take(rows, positions),
            before_offsets=offsets_of(positions),
            listed=self.lists(indices),
        )
        parts = [self.prompts.sizes(objective, at) for objective in self.objectives]
        sizes = Sizes(
            num_tokens=np.sum([part.num_tokens for part in parts], axis=0),
            num_groups=np.ones_like(indices),
            num_scored=np.sum([part.num_scored for part in parts], axis=0),
            num_logical_tokens=np.sum([part.num_logical_tokens for part in parts], axis=0),
        )
        return OneByOne(sizes, lambda place: self.example(int(indices[place]), int(epochs[place])))

    def collate(self, examples: Sequence[DistillExample], *, step: int) -> PackedBatch:
        """Pack one micro-batch, the same at any step; without examples, the dummy batch."""
        if not examples:
            return dummy_batch(self.num_negatives)
        return pack_prompts([prompt for example in examples for prompt in example.prompts])

    def users(self, indices: I64) -> list[int]:
        """Return the numbers of the users in these examples, each once, in the order of the data."""
        return self.split.users_of(self.targets.rows[indices])

    def notes(self, sampler: GlobalBatchSampler) -> list[str]:
        """Say which positions are left out."""
        own = f"positions with fewer than {FIRST_POSITION} items before them have no example to show and are left out"
        return [*self.prepared.cache_notes(self.split.name, sampler.window), own]

    def check(self, sampler: GlobalBatchSampler, *, top_h: int, max_tokens: int, max_positions: int | None) -> None:
        """Raises UserError for data without positions, a small catalogue or micro-batch, or prompts too long for the model."""
        if not len(self.targets):
            raise UserError(f"data.path: no training row has a target after {FIRST_POSITION} items; prepare longer sequences")
        free = self.prepared.num_items - int(np.diff(self.split.offsets).max())
        if max(self.num_negatives + 1, top_h) > free:
            raise UserError(
                f"negatives.num ({self.num_negatives}) is more than the catalogue allows: {free} of {self.prepared.num_items} "
                "items are outside the longest history; lower it"
            )
        bounds = [self.prompts.longest(objective, top_h) for objective in self.objectives]
        tokens, positions = sum(rows for rows, _ in bounds), max(last for _, last in bounds)
        if tokens > max_tokens:  # the bound may be loose
            steps = (self.draw(*sampler.examples_of_step(step)) for step in range(sampler.num_steps))
            tokens = max(int(drawn.sizes.num_tokens.max()) for drawn in steps)
        if tokens > max_tokens:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the longest pair of prompts ({tokens} tokens); "
                "raise it or lower prompt.max_history or negatives.num"
            )
        check_positions(positions, max_positions)


class ObjectiveBalance:
    """Implements methods.task.Exchange: weighs the two objectives of the next step by their gradients in this one."""

    def __init__(self, scorer: Scorer) -> None:
        self._loss, self._embeddings = cast(WeightedChoices, scorer.loss), cast(SoftPromptEmbedding, scorer.input_embeddings)

    def step_sums(self) -> Tensor:
        """Return each objective's gradient on the soft prompt, flat: (2 n D,)."""
        return self._embeddings.take_gradients().flatten()

    def end_step(self, sums: Tensor) -> None:
        """Weigh the objectives of the next step."""
        self._loss.balance(sums.view(2, self._embeddings.num_vectors, -1))


def distill_task(spec: ModelSpec, examples: DistillExamples, *, sampler: GlobalBatchSampler, width: int) -> Task:
    """Train the soft prompt before the model of `spec`, of `width`. Call examples.check() first."""

    def build() -> nn.Module:
        loss = WeightedChoices(examples.objectives)
        return Scorer(build_model(spec), loss, WeightedChoices.metric_names)

    def check(module: Any, score: Score) -> None:
        check_scorer(module, score, dtype=spec.dtype)

    def exchange(module: nn.Module) -> Exchange:
        return ObjectiveBalance(cast(Scorer, module)) if len(examples.objectives) == 2 else NoExchange()

    return Task(
        name="delrec_distill",
        sampler=sampler,
        data=examples,
        model=TaskModel(build, spec.dtype, width, WeightedChoices.metric_names, check=check, spec=spec),
        save=lambda weights, module, folder: save_run_model(weights, module, spec, examples.builder, examples.prepared, folder),
        exchange=exchange,
        notes=lambda: examples.notes(sampler),
    )
