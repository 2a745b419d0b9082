"""What a method gives to the training loop: data, a model with its loss, and what a finished run leaves.

A method builds one `Task` from parts. Parts that a method does not need have a default that does nothing, so neither
the loop nor the methods ask whether they are there.

An example is the smallest thing that is assigned to a micro-batch: a prompt with its groups for a language model, a
sequence for a recommender. A group is what one loss value compares: a chosen completion with its rejected ones, or one
target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.models.assemble import ModelSpec
from rec_dist.packing.sizes import Sizes
from rec_dist.runtime.arrays import I64
from rec_dist.runtime.world import World

Score = Callable[[Any], Tensor]  # batch -> what module.forward returns last: log-probs (N,), or states (U, D)
SaveModel = Callable[[dict[str, Tensor], nn.Module, Path], None]  # (name -> whole trainable weight, module, folder)


class DrawnExamples(Protocol):
    """Examples of which everything random is settled and none is built yet.

    Every rank needs the sizes of all examples of a step, and builds only its own, so sizes should cost little: at 512 ranks with
    16 examples each, 10 us an example are 80 ms a step.
    """

    @property
    def sizes(self) -> Sizes: ...

    def build(self, chosen: Sequence[int]) -> Sequence[Any]:
        """Build the examples at these places, in this order."""
        ...


class TaskData(Protocol):
    """The examples of a task. `Task.sampler` decides which of them a step trains on."""

    def draw(self, indices: I64, epochs: I64) -> DrawnExamples:
        """The examples with these indices as these epochs have them; indices, epochs (u,).

        A pure function of its arguments: every rank draws the same examples, and so does every restart.
        """
        ...

    def collate(self, examples: Sequence[Any], *, step: int) -> Any:
        """Return one batch of examples of global step `step`; without examples, the dummy batch.

        A rank that has nothing to do in a step runs the dummy batch. It adds exactly 0 to every sum and gradient.
        """
        ...

    def users(self, indices: I64) -> list[int]:
        """Return the numbers of the users in these examples in the prepared data, each once; indices (u,). Logs show them."""
        ...


def no_check(module: nn.Module, score: Score) -> None:
    """Check nothing: for modules that are our own."""


@dataclass(frozen=True)
class TaskModel:
    """The module to train, with its loss inside.

    module.forward(batch) returns (loss_sum, sums, logps): loss_sum () with its graph; sums (2 + S,) float64 without one, which
    are loss, count and each of the S metrics; logps (N,).
    """

    build: Callable[[], nn.Module]  # called inside the engine's sharded loading
    dtype: torch.dtype
    width: int  # of the module's layers: tells the engine which parameters are small
    metric_names: tuple[str, ...] = ()
    mean_over: Literal["groups", "tokens"] = "groups"  # of the whole global batch; tokens: the scored ones
    check: Callable[[nn.Module, Score], None] = no_check  # of the module in its engine; raises UserError if it does not behave
    spec: ModelSpec | None = None  # of the language model inside, which tells its memory; None: one that any device holds whole

    def notes(self) -> list[str]:
        """Lines for the log on how the module runs."""
        return [] if self.spec is None else self.spec.notes()


def same_draw(epoch: int) -> int:
    """Return 0 for every epoch: the examples of all epochs are equal."""
    return 0


@dataclass(frozen=True)
class Reference:
    """The loss compares with log-probs of the model that the run starts from.

    key: changes with everything that a reference log-prob depends on; a cache under another key is not read.
    draw_epoch: the epoch that the random draws of an epoch are made for. Epochs with the same one share cached log-probs.
    """

    key: str
    draw_epoch: Callable[[int], int] = same_draw


class Exchange(Protocol):
    """Numbers that ranks exchange once a step, within the reduction that the loop makes anyway."""

    def step_sums(self) -> Tensor:
        """Return what the backward passes of this step left on this rank, to be summed over ranks: (K,) float64, anywhere."""
        ...

    def end_step(self, sums: Tensor) -> None:
        """Take the sums (K,) over all ranks, just before the optimizer's step. On a GPU they are there, so reading them waits."""
        ...


class NoExchange:
    """A method whose steps leave nothing: K = 0."""

    def step_sums(self) -> Tensor:
        """Return no number."""
        return torch.zeros(0, dtype=torch.float64)

    def end_step(self, sums: Tensor) -> None:
        """Do nothing."""


def no_exchange(module: nn.Module) -> Exchange:
    """Exchange nothing."""
    return NoExchange()


@dataclass(frozen=True)
class Passes:
    """What a task may run besides its steps: passes of the module as it is.

    score: runs one batch in evaluation mode, without a graph, and returns what module.forward returns last, float32 on the CPU.
    A collective: every rank calls it as often. run_folder: the run directory, in which results may be kept. max_tokens: of a
    micro-batch. report: (done, total).
    """

    module: nn.Module
    score: Score
    run_folder: Path
    world: World
    max_tokens: int
    report: Callable[[int, int], None]


def no_first_pass(passes: Passes) -> None:
    """Compute nothing."""


def nothing_after(passes: Passes, step: int) -> None:
    """Compute nothing."""


def no_notes() -> list[str]:
    """Say nothing."""
    return []


@dataclass(frozen=True)
class Task:
    """A method on its data. A task holds no state of a run, so one task may serve several.

    name: for the log. sampler: which examples each global step trains on; its seed is also that of dropout.
    save: writes what evaluation and serving need; called on rank 0.
    reference: None for a loss that needs none. exchange: makes the `Exchange` for the module that trains.
    first_pass: computes what the module needs before its first loss, with the weights that the run starts from; called before
    anything is restored. after_step: called after each step (1, 2, ...), before its checkpoint. What it changes in the module must
    be in a checkpoint (engine/whole_state.py), and the same on every rank.
    notes: lines for the log on what the user should know about the data; called on rank 0.
    """

    name: str
    sampler: GlobalBatchSampler
    data: TaskData
    model: TaskModel
    save: SaveModel
    reference: Reference | None = None
    exchange: Callable[[nn.Module], Exchange] = no_exchange
    first_pass: Callable[[Passes], None] = no_first_pass
    after_step: Callable[[Passes, int], None] = nothing_after
    notes: Callable[[], list[str]] = no_notes
