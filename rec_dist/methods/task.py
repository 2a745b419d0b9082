"""What a task is to the loop: examples to plan with, batches to run, a module to train, a model to save. No method in sight.

A example is the smallest thing the global plan moves: a prompt with its groups for a language model, a sequence for a
recommender. A method of a paper is one file beside this one that builds a Task.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.runtime.arrays import I64


class Example(Protocol):
    """One example, built: what it costs and what it counts."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def num_scored(self) -> int: ...
    @property
    def num_logical_tokens(self) -> int: ...


class Task(Protocol):
    """A method on its data. `metric_names` name the sums that module.forward returns after loss and count."""

    name: str
    metric_names: tuple[str, ...]
    needs_reference: bool
    counts_tokens: bool  # the loss is a mean over scored tokens, else over groups
    sampler: GlobalBatchSampler
    dtype: torch.dtype
    width: int  # of the module's layers: tells the engine what counts as small
    reference_key: str  # changes with everything that a reference log-prob depends on

    def draw_epoch(self, epoch: int) -> int:
        """The epoch that the random draws of `epoch` are made for; equal ones make equal examples."""
        ...

    def build_module(self) -> nn.Module:
        """The module to train; called once, inside the engine's sharded loading."""
        ...

    def example(self, index: int, epoch: int) -> Any:
        """Builds example `index` of 0..num_examples-1 as epoch `epoch` has it: a pure function of its arguments."""
        ...

    def examples(self, indices: I64, epochs: I64) -> Sequence[Any]:
        """unit() of each; indices, epochs (u,)."""
        ...

    def users(self, indices: I64) -> list[str]:
        """The source's names of the users whose targets are in these examples, each once; indices (u,)."""
        ...

    def collate(self, examples: Sequence[Any], *, step: int) -> Any:
        """One batch of examples of global step `step`; for none, the dummy batch that a rank with nothing to do runs."""
        ...

    def notes(self) -> list[str]:
        """Lines for the log: what the user should know of the data this task is on."""
        ...

    def check_module(self, module: nn.Module, score: Callable[[Any], Tensor]) -> None:
        """Raises UserError when the module, now in the engine, does not behave. score: batch -> logps."""
        ...

    def step_sums(self) -> Tensor:
        """(K,) float64, CPU: what this rank's backward passes of a step left that must be summed over ranks; K is often 0."""
        ...

    def end_step(self, sums: Tensor) -> None:
        """Takes those sums of all ranks, just before the optimizer's step; the same on every rank."""
        ...

    def save_model(self, weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        """Writes what evaluation and serving need into `folder`; called on rank 0 with whole trainable weights."""
        ...
