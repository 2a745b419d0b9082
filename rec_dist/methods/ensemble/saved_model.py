"""An ensemble on disk: its weights in ensemble.safetensors and ensemble.json, and a copy of each member."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import TRAIN_AGAIN, UserError, one_line
from rec_dist.methods.ensemble.folder import DESCRIPTION
from rec_dist.methods.ensemble.rerank import Retrieval
from rec_dist.methods.ensemble.weights import F64

WEIGHTS_NAME = "ensemble.safetensors"


@dataclass(frozen=True)
class EnsembleWeights:
    """What was learnt. F features, M members and terms.

    features: F names, a member's own or MEMBER.PART. weights (F,) float64 of the features as they are. owners: M names of members
    and terms. without (M, F): the weights learnt without that member or term, 0 for its features. scales (F,): the standard
    deviation of each feature on the validation split. retrieval: the first stage of two, None for one.
    """

    members: list[str]
    terms: list[str]
    features: list[str]
    owners: list[str]
    weights: F64
    without: F64
    scales: F64
    retrieval: Retrieval | None = None

    @property
    def num_retrieved(self) -> int | None:
        """task.ensemble.rerank."""
        return None if self.retrieval is None else self.retrieval.num

    def write(self, folder: Path, data: PreparedData) -> None:
        """Writes both files."""
        arrays = {"weights": self.weights, "without": self.without, "scales": self.scales}
        first = self.retrieval
        save_file(arrays if first is None else arrays | {"retrieval": first.weights}, folder / WEIGHTS_NAME)
        DESCRIPTION.write(
            folder,
            data,
            members=self.members,
            terms=self.terms,
            features=self.features,
            owners=self.owners,
            retrieval=None if first is None else {"num": first.num, "features": first.features},
            weights=dict(zip(self.features, self.weights.tolist(), strict=True)),  # to be read by people
        )

    @staticmethod
    def read(folder: Path) -> "EnsembleWeights":
        """Reads what write() wrote. Raises UserError if it is missing or damaged."""
        value = DESCRIPTION.read(folder)
        try:
            arrays = load_file(folder / WEIGHTS_NAME)
            names = {key: [str(name) for name in value[key]] for key in ("members", "terms", "features", "owners")}
            weights, without, scales = (arrays[name] for name in ("weights", "without", "scales"))
            shapes = (len(names["features"]),), (len(names["owners"]), len(names["features"]))
            first = value["retrieval"]
            retrieval = None if first is None else Retrieval(int(first["num"]), list(first["features"]), arrays["retrieval"])
            if weights.shape != shapes[0] or without.shape != shapes[1]:
                raise ValueError(f"weights of shape {weights.shape} and {without.shape} in place of {shapes}")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as fault:
            raise UserError(f"{folder} holds a damaged ensemble ({one_line(fault)}); {TRAIN_AGAIN}") from fault
        wide, whole = weights.astype(np.float64), without.astype(np.float64)
        return EnsembleWeights(**names, weights=wide, without=whole, scales=scales, retrieval=retrieval)
