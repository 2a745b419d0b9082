"""What binds a saved model on item ids to the data set whose ids it knows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.storage.files import read_object, write_json


@dataclass(frozen=True)
class CatalogueFile:
    """A JSON file of a model folder that says, among others, on which data set the model was made."""

    name: str

    def write(self, folder: Path, data: PreparedData, **values: Any) -> None:
        """Writes `values` and the fingerprint of `data` into `folder`."""
        write_json(folder / self.name, {**values, "data_fingerprint": data.manifest.fingerprint})

    def read(self, folder: Path) -> dict[str, Any]:
        """What write() wrote. Raises UserError if it is missing or damaged."""
        return read_object(folder / self.name, TRAIN_AGAIN)

    def check(self, folder: Path, data: PreparedData) -> None:
        """Raises UserError if the model in `folder` was made on another data set, where item ids mean other items."""
        if self.read(folder).get("data_fingerprint") != data.manifest.fingerprint:
            raise UserError(
                f"the model in {folder} was trained on another data set than {data.location}; its item ids mean other items "
                "there; evaluate it on its own, or train one on this"
            )
