"""Sequential recommenders as a method, and how models on item ids rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import Floats
from rec_dist.evaluation.measure import score_in_blocks
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import Evaluation, Launch, ScoreStream
from rec_dist.methods.sequential.config import SequentialConfig
from rec_dist.methods.sequential.saved_model import check_catalogue, load_recommender
from rec_dist.methods.sequential.scorer import SequentialScorer
from rec_dist.methods.sequential.task import build_sequential_task
from rec_dist.methods.task import Task


class ItemIdRanker:
    """Implements Ranker for the recommenders of methods/sequential, which run in the driver's process."""

    language_model = False

    def weights(self, config: RunConfig, saved: Path | None) -> InitialWeights:
        """As Ranker.weights. Raises UserError for None: nothing is pretrained."""
        if saved is None:
            raise UserError(
                f"task.kind={config.task.kind} has no base model; train it and give its run directory, or set "
                "evaluate.ranker=popularity"
            )
        return InitialWeights(saved)

    def check(self, saved: Path, data: PreparedData) -> None:
        """Raises UserError for another data set, where item ids mean other items."""
        check_catalogue(saved, data)

    def score(self, evaluation: Evaluation, launch: Launch) -> tuple[ScoreStream, dict[str, Any]]:
        """As Ranker.score, without workers, block by block."""
        return self._blocks(evaluation), {}

    def _blocks(self, evaluation: Evaluation) -> Iterator[Floats]:
        config, data, initial, saved = evaluation.config, evaluation.data, evaluation.initial, evaluation.saved
        with self.scoring(config, data, initial, saved, "cpu") as scorer:
            yield from score_in_blocks(scorer, evaluation.examples)

    @contextmanager
    def scoring(
        self, config: RunConfig, data: PreparedData, initial: InitialWeights, saved: Path | None, device: str
    ) -> Iterator[SequentialScorer]:
        """As Ranker.scoring. The scorer is the model on `device`."""
        yield SequentialScorer(load_recommender(initial.model), device=device)

    def embed(self, config: RunConfig, folder: Path, saved: Path | None) -> NoReturn:
        """Raises UserError."""
        raise UserError(
            f"task.kind={config.task.kind} is a recommender, which reads no titles; give the run or the CONFIG of a language "
            "model"
        )

    def merged(self, config: RunConfig, saved: Path) -> NoReturn:
        """Raises UserError."""
        raise UserError(
            f"{saved} is a recommender without a language model; export takes a run that trained an adapter or soft prompts"
        )


class Sequential:
    """Implements Method."""

    name = "sequential"
    section = ("sequential", SequentialConfig)
    ranker = ItemIdRanker()

    def initial_weights(self, config: RunConfig) -> InitialWeights:
        """The vectors in task.sequential.init_embeddings, or nothing."""
        vectors = config.task.section(SequentialConfig).init_embeddings
        return InitialWeights(Path(), embeddings=Path(vectors) if vectors else None)

    def build(self, config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
        """As Method.build."""
        return build_sequential_task(config, split=split)

    def plan(self, config: RunConfig) -> NoReturn:
        """Raises UserError: `plan` is about language models."""
        raise UserError(f"task.kind={self.name} is a small model that fits anywhere; plan is for language models")


SEQUENTIAL = Sequential()
