"""P2Rec's stage 1 (arXiv 2406.00333), information reconstruction: a language model that reads a history learns to say which kinds of
items its user prefers.

  categories   k-means on the item embeddings of a trained recommender, C of them
  g_u (C,)     the share of each among the items of user u's training row
  h_u (D,)     the pooled state of the model after the prompt of u's last items
  KL           L = sum over u of sum_c g_uc log( g_uc / softmax(W h_u + b)_c )        or MSE: mean_c ( (W h_u + b)_c - g_uc )^2

One instance a user, not one an interaction. LoRA, W and b train. Stage 2, which embeds items with the model that this leaves, is
methods/language_model/embedding.py; what recommenders make of the embeddings is methods/sequential/initial_embeddings.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.errors import UserError
from rec_dist.losses import LossSums
from rec_dist.methods.language_model.saved_model import save_run_model
from rec_dist.methods.p2rec.categories import preference
from rec_dist.models.assemble import ModelSpec, build_model
from rec_dist.models.encoder import Encoder, PreferenceHead, check_alone
from rec_dist.packing.pooled_prompts import PooledPrompts, dummy_batch, pack_pooled_prompts
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.files import fingerprint

PREFERENCE_HEAD_NAME = "preference_reader.safetensors"  # W, b and every item's category, beside the saved adapter
_GUESSED_USERS, _LEAST_SHARE = 1000, 1e-4  # the second: of a category that none of them has, or its logarithm would be -inf


def losses_of(outputs: Tensor, wanted: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """outputs (U, C) = W h + b, wanted (U, C) = g -> (the loss of each user (U,), in nats for kl; what is said of them (U, C))."""
    if kind == "mse":
        return (outputs - wanted).square().mean(dim=1), outputs
    said = outputs.log_softmax(dim=1)
    return (torch.xlogy(wanted, wanted) - wanted * said).sum(dim=1), said.exp()  # 0 log 0 = 0


def reconstruction_loss(outputs: Tensor, prompts: PooledPrompts, *, kind: str) -> LossSums:
    """Sums over the users of a micro-batch. Metric: half the L1 distance of what is said and what is so, 0 to 1 for distributions.

    A prompt of weight 0 contributes exactly 0, even where its output is NaN.
    """
    weights = prompts.weights
    losses, said = losses_of(outputs.masked_fill((weights == 0).unsqueeze(1), 0.0), prompts.labels, kind=kind)
    distance = (said.detach() - prompts.labels).abs().sum(dim=1) / 2
    return LossSums((losses * weights).sum(), weights.sum(), {"preference/distance": (distance * weights).sum()})


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
        """P."""
        return len(self.tokens)

    @property
    def num_logical_tokens(self) -> int:
        """P: a user stands once anywhere."""
        return len(self.tokens)


class P2RecReconstructTask:
    """Implements tasks.task.Task. Example u is row u of the training split, and a mean loss is over users."""

    name = "p2rec_reconstruct"
    metric_names: tuple[str, ...] = ("preference/distance",)
    needs_reference = False
    counts_tokens = False
    reference_key = ""

    def __init__(
        self,
        spec: ModelSpec,
        data: PreparedData,
        split: SequenceSplit,
        builder: PromptBuilder,
        categories: I32,
        *,
        sampler: GlobalBatchSampler,
        width: int,
        num_categories: int,
        loss: str,
        pooling: str,
    ) -> None:
        self.sampler, self.dtype, self.width = sampler, spec.dtype, width
        self._spec, self._data, self._split, self._builder = spec, data, split, builder
        self._categories, self._num_categories, self._loss, self._pooling = categories, num_categories, loss, pooling
        self._print = float(int(fingerprint(categories.tolist()), 16) % (1 << 16))
        self._agreed = False

    def build_module(self) -> nn.Module:
        """The reader; the adapter and the linear layer require gradients. What it says first is the same guess for everyone."""
        encoder = Encoder(build_model(self._spec), max_tokens=self._spec.max_tokens)
        loss = lambda outputs, prompts: reconstruction_loss(outputs, prompts, kind=self._loss)
        return PreferenceHead(encoder, self._guess(self._first_preferences()), self.width, loss, self.metric_names)

    def _first_preferences(self) -> Tensor:
        """(U, C): of the users of the first steps, about 1,000."""
        first = range(min(self.sampler.num_steps, -(-_GUESSED_USERS // self.sampler.examples_per_step)))
        users = np.unique(np.concatenate([self.sampler.examples_of_step(step)[0] for step in first]))
        return torch.stack([torch.from_numpy(self._preference(user)) for user in users.tolist()])

    def _preference(self, row: int) -> npt.NDArray[np.float32]:
        """g_u (C,) of row `row`."""
        return preference(self._categories, self._split.items_of(row), self._num_categories)

    def _guess(self, preferences: Tensor) -> Tensor:
        """Outputs (C,) that say the mean of `preferences` (U, C)."""
        mean = preferences.mean(dim=0)
        return mean.clamp(min=_LEAST_SHARE).log() if self._loss == "kl" else mean

    def draw_epoch(self, epoch: int) -> int:
        """0: a example draws nothing."""
        return 0

    def example(self, index: int, epoch: int) -> UserExample:
        """The prompt and the preferences of row `index` of the training split: held-out items are in neither."""
        tokens = self._builder.prompt(self._split.items_of(index)[-self._builder.max_history :])
        return UserExample(tokens, self._builder.num_pooled(tokens, self._pooling), self._preference(index))

    def examples(self, indices: I64, epochs: I64) -> list[UserExample]:
        """unit() of each."""
        return [self.example(index, epoch) for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True)]

    def users(self, indices: I64) -> list[str]:
        """The source's names of these users, each once, in the order of the data."""
        return self._split.users_of(indices)

    def collate(self, examples: Sequence[UserExample], *, step: int) -> PooledPrompts:
        """One micro-batch, the same at any step; the dummy batch for none."""
        if not examples:
            return dummy_batch(self._num_categories)
        labels = np.stack([example.preference for example in examples])
        return pack_pooled_prompts([example.tokens for example in examples], [example.num_pooled for example in examples], labels)

    def notes(self) -> list[str]:
        """The loss of one guess for everyone, which a reader of histories must come below."""
        every = self._first_preferences()
        loss = float(losses_of(self._guess(every).expand_as(every), every, kind=self._loss)[0].mean())
        own = f"the mean preference of {len(every):,} users, said of each of them, has loss {loss:.4f}"
        return [*self._data.cache_notes(self._split.name, self.sampler.window), own]

    def check(self, max_tokens: int, *, max_positions: int | None) -> None:
        """Raises UserError for data without users, a micro-batch too small, or prompts longer than the model takes."""
        if not len(self._split):
            raise UserError("data.path: the training split has no user; prepare other data")
        longest = self._longest(max_tokens)
        if longest > max_tokens:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the longest prompt ({longest} tokens); raise it or lower "
                "prompt.max_history"
            )
        if max_positions is not None and longest > max_positions:
            raise UserError(
                f"a prompt may take {longest} positions and the model has {max_positions}; lower prompt.max_history or shorten "
                "prompt.instruction"
            )

    def _longest(self, max_tokens: int) -> int:
        """Tokens of the longest prompt: a bound from the longest title, or where that is too long for a micro-batch the exact one."""
        items = min(self._builder.max_history, int(np.diff(self._split.offsets).max()))
        title = int(self._builder.titles.lengths.max()) + len(self._builder.pieces.item_prefix)
        bound = len(self._builder.pieces.begin) + items * title + len(self._builder.pieces.tail)
        if bound <= max_tokens:
            return bound
        steps = (self.sampler.examples_of_step(step) for step in range(self.sampler.num_steps))
        return max(example.num_tokens for indices, epochs in steps for example in self.examples(indices, epochs))

    def check_module(self, module: nn.Module, score: Callable[[PooledPrompts], Tensor]) -> None:
        """Raises UserError when the model's attention does not keep to the mask. score: prompts -> states (U, D)."""

        def labelled(prompts: PooledPrompts) -> Tensor:
            uniform = torch.full((len(prompts.weights), self._num_categories), 1 / self._num_categories)
            return score(replace(prompts, labels=uniform))

        check_alone(labelled, vocab_size=module.encoder.vocab_size, dtype=self.dtype)  # type: ignore[arg-type,union-attr]

    def step_sums(self) -> Tensor:
        """Once: what tells whether all ranks found the same categories."""
        values = [] if self._agreed else [1.0, self._print, self._print**2]
        return torch.tensor(values, dtype=torch.float64)

    def end_step(self, sums: Tensor) -> None:
        """Raises UserError on all ranks where n * sum of squares is not the square of the sum: then not all are equal."""
        if len(sums):
            ranks, total, squares = sums.tolist()
            if ranks * squares != total**2:
                raise UserError(
                    "task.p2rec: the workers do not find the same categories; give them the same machines and packages"
                )
            self._agreed = True

    def save_model(self, weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        """As tasks.saved.save_run_model, and what reads preferences."""
        own = {name.removeprefix("linear."): value for name, value in weights.items() if name.startswith("linear.")}
        model = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
        assert len(own) == 2 and len(own) + len(model) == len(weights), sorted(weights)
        encoder: Any = module.encoder
        save_run_model(model, encoder, self._spec, self._builder, self._data, folder)
        save_file(
            {**own, "categories": torch.from_numpy(self._categories)}, folder / PREFERENCE_HEAD_NAME, metadata={"format": "pt"}
        )
