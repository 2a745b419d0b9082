"""Sequential recommenders as a method."""

from pathlib import Path
from typing import NoReturn

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.scored_lists import check_lists
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.item_ids import ItemIdRanker
from rec_dist.methods.sequential.config import SequentialConfig
from rec_dist.methods.sequential.saved_model import SHAPE_FILE, load_recommender
from rec_dist.methods.sequential.scorer import SequentialScorer
from rec_dist.methods.sequential.task import build_sequential_task
from rec_dist.methods.task import Task


class SequentialRanker(ItemIdRanker):
    """Implements Ranker for the recommenders of methods/sequential."""

    catalogue = SHAPE_FILE

    def load(self, folder: Path, device: str) -> CandidateScorer:
        """The recommender in `folder`, on `device`. Raises UserError if it is missing or damaged."""
        return SequentialScorer(load_recommender(folder), device=device)


class Sequential:
    """Implements Method."""

    name = "sequential"
    section = ("sequential", SequentialConfig)
    ranker = SequentialRanker()

    def initial_weights(self, config: RunConfig) -> InitialWeights:
        """The vectors in task.sequential.init_embeddings, and the teacher's lists in task.sequential.distil.lists, if any."""
        settings = config.task.section(SequentialConfig)
        vectors, lists = (Path(folder) if folder else None for folder in (settings.init_embeddings, settings.distil.lists))
        if lists is not None:
            check_lists(lists)
        return InitialWeights(Path(), embeddings=vectors, teacher=lists)

    def build(self, config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
        """As Method.build."""
        return build_sequential_task(config, split=split)

    def plan(self, config: RunConfig) -> NoReturn:
        """Raises UserError: `plan` is about language models."""
        raise UserError(f"task.kind={self.name} is a small model that fits anywhere; plan is for language models")


SEQUENTIAL = Sequential()
