"""Neighbours as a method: fitted in seconds, and the baseline that every language model should be compared with."""

from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.embeddings import read_embeddings
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.dataset.schema import ITEMS_NAME
from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.evaluation.baselines import CandidateScorer
from rec_dist.methods.catalogue_file import CatalogueFile
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.item_ids import ItemIdRanker
from rec_dist.methods.method import Launch
from rec_dist.methods.neighbours.config import NeighboursConfig
from rec_dist.methods.neighbours.scorer import NeighboursScorer
from rec_dist.methods.neighbours.tables import NeighbourTables, fit_tables
from rec_dist.runtime.arrays import F32
from rec_dist.runtime.run_directory import RunDirectory

SETTINGS = CatalogueFile("neighbours.json")


class NeighboursRanker(ItemIdRanker):
    """Implements Ranker."""

    catalogue = SETTINGS

    def load(self, folder: Path, device: str) -> CandidateScorer:
        """The tables in `folder`. Raises UserError if they are missing or damaged."""
        try:
            settings = NeighboursConfig.model_validate(SETTINGS.read(folder)["settings"])
        except (ValidationError, KeyError) as fault:
            raise UserError(f"{folder / SETTINGS.name} has other fields than this release writes; {TRAIN_AGAIN}") from fault
        return NeighboursScorer(NeighbourTables.read(folder), settings)


class Neighbours:
    """Implements FittedMethod."""

    name = "neighbours"
    section = ("neighbours", NeighboursConfig)
    ranker = NeighboursRanker()

    def initial_weights(self, config: RunConfig) -> InitialWeights:
        """The vectors in task.neighbours.embeddings, or nothing."""
        vectors = config.task.section(NeighboursConfig).embeddings
        return InitialWeights(Path(), embeddings=Path(vectors) if vectors else None)

    def check_fit(self, config: RunConfig, initial: InitialWeights) -> None:
        """As FittedMethod.check_fit."""
        data, settings = _open(config), config.task.section(NeighboursConfig)
        _vectors(settings, data)
        if settings.title_weight == settings.next_weight == 0 and (settings.embeddings is None or settings.embedding_weight == 0):
            raise UserError(
                "task.neighbours.title_weight and next_weight are 0, so no item has a neighbour; raise one, name "
                "task.neighbours.embeddings, or set evaluate.ranker=popularity"
            )

    def fit(self, config: RunConfig, initial: InitialWeights, folder: Path, run: RunDirectory, launch: Launch) -> dict[str, Any]:
        """As FittedMethod.fit."""
        data, settings = _open(config), config.task.section(NeighboursConfig)
        vectors, width = _vectors(settings, data), settings.embedding_width
        tables = fit_tables(data, top_k=settings.top_k, splits=settings.splits, vectors=vectors, width=width)
        tables.write(folder)
        SETTINGS.write(folder, data, settings=settings.without_paths())
        data.copy_items(folder / ITEMS_NAME)
        by_vectors = "" if tables.embedding is None else f", {tables.embedding.nnz:,} by the model's vectors"
        run.log(
            f"neighbours of {data.num_items:,} items: {tables.title.nnz:,} by title, {tables.following.nnz:,} by what was chosen "
            f"next{by_vectors}"
        )
        return {}

    def plan(self, config: RunConfig) -> NoReturn:
        """Raises UserError: `plan` is about language models."""
        raise UserError(f"task.kind={self.name} needs no GPU and seconds to fit; plan is for language models")


def _open(config: RunConfig) -> PreparedData:
    data = open_data(config.data)
    if not len(data.split("train")):
        raise UserError(f"the train split of {data.location} has no user; prepare data whose train split has one")
    return data


def _vectors(settings: NeighboursConfig, data: PreparedData) -> list[F32]:
    """The vectors in task.neighbours.embeddings, as blocks (n, D).

    Raises UserError as read_embeddings(), or if they are narrower than embedding_width.
    """
    if settings.embeddings is None:
        return []
    blocks = read_embeddings(Path(settings.embeddings), data_fingerprint=data.manifest.fingerprint)
    source = blocks[0].shape[1]
    if settings.embedding_width > (most := min(source, data.num_items - 1)):
        raise UserError(
            f"task.neighbours.embedding_width ({settings.embedding_width}) is more than the {most} directions that "
            f"{data.num_items} vectors of width {source} can have; lower it"
        )
    return blocks


NEIGHBOURS = Neighbours()
