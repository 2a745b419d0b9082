"""What a method is to the commands: its configuration, what it starts from, its task, and how its models rank.

A method is one value of task.kind. It lives in a folder beside this file, or in a package of your own. Commands ask its `Method`
and never compare task.kind. Whether its models are language models or recommenders on item ids is known to its `Ranker` alone.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from rec_dist.config.schema import ClusterConfig, RunConfig
from rec_dist.config.section import Section
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.evaluation.baselines import CandidateScorer
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.embedding import EmbedJob
from rec_dist.methods.task import Task
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World

# One (C_u,) an example, in the order of its candidates, perhaps made as it is read. Higher is better.
ScoreStream = Iterable[npt.NDArray[np.floating[Any]]]


class Launch(Protocol):
    """Runs `worker` on every worker of the cluster and returns the result of rank 0."""

    def __call__(
        self, worker: Callable[[World, Any], dict[str, Any]], job: Any, cluster: ClusterConfig, run: RunDirectory
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Evaluation:
    """What a ranker scores.

    saved: the model folder of the run that trained the model, None for a base model. run: the folder of the results.
    own_examples: whether the examples are others than the section evaluate describes, so that workers must be given them.
    """

    config: RunConfig
    data: PreparedData
    examples: Sequence[EvalExample]
    initial: InitialWeights
    saved: Path | None
    run: RunDirectory
    own_examples: bool = False


@dataclass(frozen=True)
class PlannedPrompts:
    """What `plan` must know of a method's prompts.

    prompts_per_group: prompts that one group needs, which share a micro-batch. extra_items: mean items that each shows besides
    the history and listed candidates. first_target: targets before this position of a user do not train.
    """

    num_negatives: int
    needs_reference: bool
    prompts_per_group: int = 1
    extra_items: float = 0.0
    first_target: int = 0


class Ranker(Protocol):
    """How a kind of model ranks, and what other commands may do with it. One serves many methods.

    language_model: whether its models are language models, which compute in model.dtype. Recommenders compute in float32.
    """

    @property
    def language_model(self) -> bool: ...

    def scores_titles(self, saved: Path | None) -> bool:
        """Whether a score takes milliseconds, as where a language model reads each candidate's title. saved: as in weights()."""
        ...

    def titles_read(self, saved: Path | None, num_candidates: int) -> int:
        """How many titles a language model reads to rank so many candidates of one user, 0 without one. saved: as in weights()."""
        ...

    def weights(self, config: RunConfig, saved: Path | None) -> InitialWeights:
        """What a finished run left in its model folder `saved`, or the base model for None.

        Raises UserError if there is no base model, or if a saved file is damaged.
        """
        ...

    def check(self, saved: Path, data: PreparedData) -> None:
        """Raises UserError if the model in `saved` cannot rank on this data."""
        ...

    def score(self, evaluation: Evaluation, launch: Launch) -> tuple[ScoreStream, dict[str, Any]]:
        """The scores of every example's candidates, read once, and what they cost: further values for the row of metrics.jsonl.

        The latter are complete when all scores have been read.

        launch: for a model that needs the workers of config.cluster.
        """
        ...

    def scoring(
        self, config: RunConfig, data: PreparedData, initial: InitialWeights, saved: Path | None, device: str
    ) -> AbstractContextManager[CandidateScorer]:
        """A scorer in this process, for any number of blocks of histories: what `rec-dist rank` asks.

        It gives the scores of score(), so a subclass that changes one changes both. initial, saved: as in Evaluation. Raises
        UserError, before it reads weights, if the model cannot rank on this data.
        """
        ...

    def embed(self, config: RunConfig, folder: Path, saved: Path | None) -> EmbedJob:
        """The job that writes item embeddings into `folder`. saved: as in weights().

        Raises UserError if the model reads no titles.
        """
        ...

    def exported(self, config: RunConfig, saved: Path) -> InitialWeights:
        """The language model to export, with the adapter and soft prompts that belong to it. Raises UserError if there is none."""
        ...

    def scores_text(self, config: RunConfig) -> bool:
        """Whether a score is log p(title, end | prompt) and nothing else, so that any server of the exported model gives it."""
        ...


class Method(Protocol):
    """One value of task.kind: a TrainedMethod or a FittedMethod.

    name: that value. section: the key below task and the class of the method's own keys, None without any.
    """

    @property
    def name(self) -> str: ...

    @property
    def section(self) -> tuple[str, type[Section]] | None: ...

    @property
    def ranker(self) -> Ranker: ...

    def initial_weights(self, config: RunConfig) -> InitialWeights:
        """What the run starts from. Raises UserError if any of it is missing or damaged."""
        ...

    def plan(self, config: RunConfig) -> PlannedPrompts:
        """Raises UserError, with what to do instead, if `plan` does not cover this method."""
        ...


@runtime_checkable
class TrainedMethod(Method, Protocol):
    """A method that the training loop trains on the workers of config.cluster."""

    def build(self, config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
        """The task on `split` (train or valid) of data.path. Raises UserError for anything that would fail later."""
        ...


@runtime_checkable
class PreparesRun(Protocol):
    """A TrainedMethod whose workers read something from the run directory that is computed before they start."""

    def prepare_run(self, config: RunConfig, run: RunDirectory, launch: Launch) -> None:
        """Called by the driver in each attempt once the run is claimed. launch: for what needs workers."""
        ...


@runtime_checkable
class FittedMethod(Method, Protocol):
    """A method that is computed at once in the driver's process: no loop, no checkpoints, and workers only if it scores members."""

    def check_fit(self, config: RunConfig, initial: InitialWeights) -> None:
        """Raises UserError for anything that fit() would refuse. Called before anything is written."""
        ...

    def fit(self, config: RunConfig, initial: InitialWeights, folder: Path, run: RunDirectory, launch: Launch) -> dict[str, Any]:
        """Writes the model into the empty `folder`, which the caller publishes; returns values for the run's summary.

        run: for the log and the progress bar. launch: for members that score on workers.
        """
        ...


_MEMBERS = ("name", "section", "ranker", "initial_weights", "plan")


def missing_members(method: object) -> list[str]:
    """The members of Method that an object lacks."""
    own = ("check_fit", "fit") if hasattr(method, "fit") else ("build",)
    return [name for name in (*_MEMBERS, *own) if not hasattr(method, name)]
