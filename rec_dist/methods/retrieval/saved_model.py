"""What retrieval adds to a saved language model: the vectors of the items, and how a state is compared with them.

retrieval.safetensors holds the item table, the projection and the terms, and retrieval.json the rest. A server needs one prompt a
user and one product with the catalogue. Cost: 4 W bytes an item.

I items, D width of the model, W width of the vectors, U users.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import TRAIN_AGAIN, UserError, one_line
from rec_dist.methods.catalogue_file import CatalogueFile
from rec_dist.methods.retrieval.head import HistoryProjection, ItemTable, RetrievalHead

WEIGHTS_NAME, DESCRIPTION = "retrieval.safetensors", CatalogueFile("retrieval.json")
_TABLE = ("vectors", "mean", "whitening", "log_counts")
_LEARNT = {
    "project.linear.weight": "projection",
    "project.linear.bias": "bias",
    "project.sharpness": "sharpness",
    "terms.weight": "terms",
}


@dataclass(frozen=True)
class RetrievalModel:
    """A trained head. terms (3,): w_seen, w_last and w_pop, in the units of a cosine."""

    table: ItemTable
    projection: HistoryProjection
    terms: Tensor
    temperature: float
    pooling: str

    @torch.no_grad()
    def users(self, states: Tensor) -> Tensor:
        """The states of the last titles (U, D) -> vectors (U, W), all of the length that the temperature of cosines gives."""
        vectors: Tensor = self.projection(states, self.table)
        return vectors

    @torch.no_grad()
    def logits(self, users: Tensor) -> Tensor:
        """users (U, W) -> (U, I), without the terms for the items of a history (head.py)."""
        return (users @ self.table.vectors.T + self.terms[2] * self.table.log_counts) / self.temperature


def save_retrieval(head: RetrievalHead, learnt: dict[str, Tensor], pooling: str, data: PreparedData, folder: Path) -> None:
    """Writes both files. learnt: the whole weights of projection and terms that train, named as in `head`."""
    assert head.table is not None
    table = {name: getattr(head.table, name).cpu().contiguous() for name in _TABLE}
    own = {short: learnt[name].float() for name, short in _LEARNT.items() if name in learnt}
    own.setdefault("terms", torch.zeros(3))
    own.setdefault("sharpness", torch.zeros(1))
    assert set(own) == set(_LEARNT.values()) and set(learnt) <= set(_LEARNT), sorted(learnt)
    save_file({**table, **own}, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    DESCRIPTION.write(folder, data, temperature=head.temperature, pooling=pooling)
    read_back = load_file(folder / WEIGHTS_NAME)
    assert all(torch.equal(read_back[name], value) for name, value in {**table, **own}.items()), folder


def load_retrieval(folder: Path) -> RetrievalModel:
    """The head that save_retrieval() wrote into `folder`, on the CPU. Raises UserError if there is none, or it is damaged."""
    described = DESCRIPTION.read(folder)
    try:
        weights = load_file(folder / WEIGHTS_NAME)
        temperature = float(described["temperature"])
        projection = HistoryProjection(weights["vectors"].shape[1], temperature, learns_temperature=False)
        learnt = {"linear.weight": weights["projection"], "linear.bias": weights["bias"], "sharpness": weights["sharpness"]}
        projection.load_state_dict(learnt)
        return RetrievalModel(
            ItemTable(*(weights[name] for name in _TABLE)),
            projection.eval().requires_grad_(False),
            weights["terms"],
            temperature,
            str(described["pooling"]),
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, IndexError) as fault:
        raise UserError(f"{folder} holds a damaged retrieval model ({one_line(fault)}); {TRAIN_AGAIN}") from fault
