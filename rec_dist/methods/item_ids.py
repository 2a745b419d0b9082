"""How models on item ids rank, in the driver's process: what recommenders, neighbours and ensembles have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, Floats
from rec_dist.evaluation.measure import score_in_blocks
from rec_dist.methods.catalogue_file import CatalogueFile
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import Evaluation, Launch, ScoreStream


class ItemIdRanker(ABC):
    """Implements Ranker with a CandidateScorer."""

    language_model: ClassVar[bool] = False
    catalogue: ClassVar[CatalogueFile]

    @abstractmethod
    def load(self, folder: Path, device: str) -> CandidateScorer:
        """The scorer of the model in `folder`, on `device`. Raises UserError if it is missing or damaged."""

    def scores_titles(self, saved: Path | None) -> bool:
        """As Ranker.scores_titles."""
        return False

    def titles_read(self, saved: Path | None, num_candidates: int) -> int:
        """As Ranker.titles_read: none."""
        return 0

    def weights(self, config: RunConfig, saved: Path | None) -> InitialWeights:
        """As Ranker.weights. Raises UserError for None: nothing is pretrained."""
        if saved is None:
            raise UserError(
                f"task.kind={config.task.kind} has no base model; train it and give {config.train.run_dir}, or set "
                "evaluate.ranker=popularity"
            )
        return InitialWeights(saved)

    def check(self, saved: Path, data: PreparedData) -> None:
        """Raises UserError for another data set, where item ids mean other items."""
        self.catalogue.check(saved, data)

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
    ) -> Iterator[CandidateScorer]:
        """As Ranker.scoring. The scorer is the model on `device`."""
        yield self.load(initial.model, device)

    def embed(self, config: RunConfig, folder: Path, saved: Path | None) -> NoReturn:
        """Raises UserError."""
        raise UserError(
            f"task.kind={config.task.kind} is a recommender, which reads no titles; give the run or the CONFIG of a language "
            "model"
        )

    def exported(self, config: RunConfig, saved: Path) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{saved} is a recommender without a language model; export takes the run of a language model")

    def scores_text(self, config: RunConfig) -> bool:
        """As Ranker.scores_text."""
        return False
