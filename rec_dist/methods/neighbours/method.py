"""Neighbours as a method: fitted in seconds, and the baseline that every language model should be compared with."""

from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from rec_dist.config.schema import RunConfig
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
        """Nothing."""
        return InitialWeights(Path())

    def check_fit(self, config: RunConfig, initial: InitialWeights) -> None:
        """As FittedMethod.check_fit."""
        _open(config)

    def fit(self, config: RunConfig, initial: InitialWeights, folder: Path, run: RunDirectory, launch: Launch) -> dict[str, Any]:
        """As FittedMethod.fit."""
        data, settings = _open(config), config.task.section(NeighboursConfig)
        tables = fit_tables(data, top_k=settings.top_k, splits=settings.splits)
        tables.write(folder)
        SETTINGS.write(folder, data, settings=settings.model_dump())
        data.copy_items(folder / ITEMS_NAME)
        run.log(
            f"neighbours of {data.num_items:,} items: {tables.title.nnz:,} by title, {tables.following.nnz:,} by what was chosen "
            "next"
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


NEIGHBOURS = Neighbours()
