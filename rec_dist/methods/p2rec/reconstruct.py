"""P2Rec's stage 1 (arXiv 2406.00333), information reconstruction: a language model reads a history and learns which kinds of
items its user prefers.

  categories   k-means on the item embeddings of a trained recommender, C of them
  g_u (C,)     the share of each among the items of user u's training row
  h_u (D,)     the pooled state of the model after the prompt of u's last items
  KL           L = sum over u of sum_c g_uc log( g_uc / softmax(W h_u + b)_c )        or MSE: mean_c ( (W h_u + b)_c - g_uc )^2

There is one example for each user, not for each interaction. LoRA, W and b train. Stage 2, which embeds items with the
trained model, is methods/language_model/embedding.py; recommenders start from these embeddings
(methods/sequential/initial_embeddings.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.errors import UserError
from rec_dist.losses import LossSums
from rec_dist.methods.language_model.limits import check_positions
from rec_dist.methods.language_model.saved_model import save_run_model
from rec_dist.methods.p2rec.categories import preference
from rec_dist.methods.task import Score, Task, TaskModel
from rec_dist.models.assemble import ModelSpec, build_model
from rec_dist.models.encoder import Encoder, PreferenceHead, check_encoder
from rec_dist.packing.pooled_prompts import PooledPrompts, dummy_batch, pack_pooled_prompts
from rec_dist.packing.sizes import OneByOne, Sizes
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.files import fingerprint

PREFERENCE_HEAD_NAME = "preference_reader.safetensors"  # W, b and every item's category, beside the saved adapter
METRIC_NAMES = ("preference/distance",)
_GUESSED_USERS = 1000
_LEAST_SHARE = 1e-4  # of a category that none of these users has, since the logarithm of 0 is -inf


def losses_of(outputs: Tensor, wanted: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """outputs (U, C) = W h + b, wanted (U, C) = g -> (each user's loss (U,), nats for kl; predicted preferences (U, C))."""
    if kind == "mse":
        return (outputs - wanted).square().mean(dim=1), outputs
    said = outputs.log_softmax(dim=1)
    return (torch.xlogy(wanted, wanted) - wanted * said).sum(dim=1), said.exp()  # 0 log 0 = 0


def reconstruction_loss(outputs: Tensor, prompts: PooledPrompts, *, kind: str) -> LossSums:
    """Sum over the users of a micro-batch. The metric is half the L1 distance of predicted and true preferences, 0 to 1.

    A prompt of weight 0 contributes exactly 0, even where its output is NaN.
    """
    weights = prompts.weights
    losses, said = losses_of(outputs.masked_fill((weights == 0).unsqueeze(1), 0.0), prompts.labels, kind=kind)
    distance = (said.detach() - prompts.labels).abs().sum(dim=1) / 2
    return LossSums((losses * weights).sum(), weights.sum(), {METRIC_NAMES[0]: (distance * weights).sum()})


@dataclass(frozen=True)
class UserExample:
    """One user: the prompt of their last items (P,), how many of its rows are pooled, and g_u (C,)."""

    tokens: I32
    num_pooled: int
    preference: npt.NDArray[np.float32]
    num_groups: int = 1
    num_scored: int = 1

    @property
    def num_tokens(self) -> int:
        """P tokens."""
        return len(self.tokens)

    @property
    def num_logical_tokens(self) -> int:
        """P: a user appears once in any layout."""
        return len(self.tokens)


@dataclass(frozen=True)
class UserExamples:
    """Implements methods.task.TaskData. Example u is row u of the training split, so held-out items are in no example.

    categories (I,): of each item, in 0..num_categories-1. pooling: as task.p2rec.pooling.
    """

    prepared: PreparedData
    split: SequenceSplit
    builder: PromptBuilder
    categories: I32
    num_categories: int
    pooling: str

    def example(self, index: int) -> UserExample:
        """Build the prompt and the preferences of row `index`."""
        tokens = self.builder.prompt(self.split.items_of(index)[-self.builder.max_history :])
        return UserExample(tokens, self.builder.num_pooled(tokens, self.pooling), self.preference(index))

    def preference(self, row: int) -> npt.NDArray[np.float32]:
        """Return g_u (C,) of row `row`."""
        return preference(self.categories, self.split.items_of(row), self.num_categories)

    def first_preferences(self, sampler: GlobalBatchSampler) -> Tensor:
        """Return g_u of the users in the first steps, about 1,000: (U, C)."""
        first = range(min(sampler.num_steps, -(-_GUESSED_USERS // sampler.examples_per_step)))
        users = np.unique(np.concatenate([sampler.examples_of_step(step)[0] for step in first]))
        return torch.stack([torch.from_numpy(self.preference(user)) for user in users.tolist()])

    def draw(self, indices: I64, epochs: I64) -> OneByOne:
        """Nothing is drawn; every epoch has the same users."""
        counts = np.diff(self.split.offsets)[indices]
        read = np.minimum(counts, self.builder.max_history)
        items = self.split.take(indices, counts)[runs(offsets_of(counts)[1:] - read, read)]
        tokens = self.builder.prompt_lengths(items, offsets_of(read))
        one = np.ones_like(tokens)
        return OneByOne(Sizes(tokens, one, one, tokens), lambda place: self.example(int(indices[place])))

    def collate(self, examples: Sequence[UserExample], *, step: int) -> PooledPrompts:
        """Pack one micro-batch, the same at any step; without examples, the dummy batch."""
        if not examples:
            return dummy_batch(self.num_categories)
        labels = np.stack([example.preference for example in examples])
        tokens, pooled = [example.tokens for example in examples], [example.num_pooled for example in examples]
        return pack_pooled_prompts(tokens, pooled, labels)

    def users(self, indices: I64) -> list[int]:
        """Return the numbers of these users, each once, in the order of the data."""
        return self.split.users_of(indices)

    def check(self, sampler: GlobalBatchSampler, *, max_tokens: int, max_positions: int | None) -> None:
        """Raises UserError for data without users, a micro-batch too small, or prompts longer than the model takes."""
        if not len(self.split):
            raise UserError("data.path: the training split has no user; prepare other data")
        longest = self._longest(sampler, max_tokens)
        if longest > max_tokens:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the longest prompt ({longest} tokens); "
                "raise it or lower prompt.max_history"
            )
        check_positions(longest, max_positions, way_out="lower prompt.max_history or shorten prompt.instruction")

    def _longest(self, sampler: GlobalBatchSampler, max_tokens: int) -> int:
        """Tokens of the longest prompt: a bound from the longest title, or the exact number if the bound exceeds max_tokens."""
        items = min(self.builder.max_history, int(np.diff(self.split.offsets).max()))
        title = int(self.builder.titles.lengths.max()) + len(self.builder.pieces.item_prefix)
        bound = len(self.builder.pieces.begin) + items * title + len(self.builder.pieces.tail)
        if bound <= max_tokens:
            return bound
        steps = (sampler.examples_of_step(step) for step in range(sampler.num_steps))
        return max(int(self.draw(indices, epochs).sizes.num_tokens.max()) for indices, epochs in steps)


class SameCategories:
    """Implements methods.task.Exchange: in the first step, checks that all ranks found the same categories."""

    def __init__(self, categories: I32) -> None:
        self._print = float(int(fingerprint(categories.tolist()), 16) % (1 << 16))
        self._agreed = False

    def step_sums(self) -> Tensor:
        """Return 1, a print of the categories and its square; after the first step nothing."""
        values = [] if self._agreed else [1.0, self._print, self._print**2]
        return torch.tensor(values, dtype=torch.float64)

    def end_step(self, sums: Tensor) -> None:
        """Raises UserError on all ranks when n * sum of squares is not the square of the sum, since then the prints differ."""
        if len(sums):
            ranks, total, squares = sums.tolist()
            if ranks * squares != total**2:
                raise UserError(
                    "task.p2rec: the workers do not find the same categories; give them the same machines and packages"
                )
            self._agreed = True


def reconstruct_task(spec: ModelSpec, examples: UserExamples, *, sampler: GlobalBatchSampler, width: int, loss: str) -> Task:
    """Train the model of `spec`, of `width`, with `loss` (kl or mse). Call examples.check() first.

    The adapter and the linear layer require gradients. Before the first step the output is the same guess for every user.
    """

    def build() -> nn.Module:
        encoder = Encoder(build_model(spec))
        sums = lambda outputs, prompts: reconstruction_loss(outputs, prompts, kind=loss)
        return PreferenceHead(encoder, _guess(examples.first_preferences(sampler), loss), width, sums, METRIC_NAMES)

    def check(module: Any, score: Score) -> None:
        def labelled(prompts: PooledPrompts) -> Tensor:
            uniform = torch.full((len(prompts.weights), examples.num_categories), 1 / examples.num_categories)
            return score(replace(prompts, labels=uniform))

        check_encoder(module.encoder, labelled, dtype=spec.dtype)

    def notes() -> list[str]:
        every = examples.first_preferences(sampler)
        guessed = float(losses_of(_guess(every, loss).expand_as(every), every, kind=loss)[0].mean())
        own = f"the mean preference of {len(every):,} users, said of each of them, has loss {guessed:.4f}"
        return [*examples.prepared.cache_notes(examples.split.name, sampler.window), own]

    return Task(
        name="p2rec_reconstruct",
        sampler=sampler,
        data=examples,
        model=TaskModel(build, spec.dtype, width, METRIC_NAMES, check=check, spec=spec),
        save=lambda weights, module, folder: _save(weights, module, spec, examples, folder),
        exchange=lambda module: SameCategories(examples.categories),
        notes=notes,
    )


def _guess(preferences: Tensor, loss: str) -> Tensor:
    """Outputs (C,) that say the mean of `preferences` (U, C)."""
    mean = preferences.mean(dim=0)
    return mean.clamp(min=_LEAST_SHARE).log() if loss == "kl" else mean


def _save(weights: dict[str, Tensor], module: nn.Module, spec: ModelSpec, examples: UserExamples, folder: Path) -> None:
    """As save_run_model, with the linear layer and the categories in a file of their own."""
    own = {name.removeprefix("linear."): value for name, value in weights.items() if name.startswith("linear.")}
    model = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    assert len(own) == 2 and len(own) + len(model) == len(weights), sorted(weights)
    encoder: Any = module.encoder
    save_run_model(model, encoder, spec, examples.builder, examples.prepared, folder)
    save_file(
        {**own, "categories": torch.from_numpy(examples.categories)}, folder / PREFERENCE_HEAD_NAME, metadata={"format": "pt"}
    )
