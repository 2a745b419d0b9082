"""The floor rankers: what a language model must beat. A ranker gives each candidate of a history one score, higher is better.

B histories, C candidates of a history, I items of the catalogue.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from rec_dist.models.next_item import Recommender, last_scores
from rec_dist.models.sequences import history_batch
from rec_dist.stream.trunk import I32, I64

Floats = npt.NDArray[np.float64]

# Logits held at once: 2 ** 24 float32 are 64 MiB, at any size of catalogue.
_LOGITS_AT_ONCE = 1 << 24


class Ranker(Protocol):
    """Scores candidates after histories."""

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """histories[b] (n_b,) and candidates[b] (C_b,) item ids -> (C_b,) each."""
        ...


class SequentialRanker:
    """Scores by log-probability, in nats, under the model's softmax over the whole catalogue."""

    def __init__(self, model: Recommender, *, device: str = "cpu") -> None:
        self._model = model.to(device).eval()
        self._device = device

    @torch.no_grad()
    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """As Ranker.score. Only the last max_length items of a history are read. ValueError: an empty history."""
        _check(histories, candidates)
        shape = self._model.shape
        at_once = max(1, min(256, _LOGITS_AT_ONCE // shape.num_items))
        scores: list[Floats] = []
        for start in range(0, len(histories), at_once):
            batch = history_batch(histories[start : start + at_once], shape.max_length).to(self._device)
            logps = last_scores(self._model, batch).double().log_softmax(dim=-1).cpu().numpy()  # (B, I)
            scores += [row[items] for row, items in zip(logps, candidates[start : start + at_once], strict=True)]
        return scores


class PopularityRanker:
    """Scores by how often an item was chosen in the training part, the same for every history.

    Equal counts stay tied: the metrics rank a tie against the target, so a tie-break could only flatter this floor.
    """

    def __init__(self, train_counts: I64) -> None:
        self._counts = train_counts.astype(np.float64)  # (I,)

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """As Ranker.score."""
        _check(histories, candidates)
        return [self._counts[items] for items in candidates]


def _check(histories: Sequence[I32], candidates: Sequence[I32]) -> None:
    if len(histories) != len(candidates):
        raise ValueError(f"{len(histories)} histories and {len(candidates)} lists of candidates; give one list a history")
