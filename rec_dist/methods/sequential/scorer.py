"""How a trained recommender scores candidates: log-probabilities under its softmax over the whole catalogue.

B histories, C candidates of a history, I items of the catalogue.
"""

from collections.abc import Sequence

import numpy as np
import torch

from rec_dist.evaluation.baselines import Floats, check_lengths
from rec_dist.methods.sequential.next_item import Recommender, last_scores
from rec_dist.methods.sequential.sequences import history_batch
from rec_dist.runtime.arrays import I32

# Logits held at once: 2 ** 24 float32 are 64 MiB, at any size of catalogue.
_LOGITS_AT_ONCE = 1 << 24


class SequentialScorer:
    """Scores by log-probability, in nats, under the model's softmax over the whole catalogue."""

    def __init__(self, model: Recommender, *, device: str = "cpu") -> None:
        self._model = model.to(device).eval()
        self._device = device

    @torch.no_grad()
    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """histories[b] (n_b,), candidates[b] (C_b,) item ids -> (C_b,) each. Reads the last max_length items of a history.

        Raises ValueError for an empty history.
        """
        check_lengths(histories, candidates)
        shape, shared = self._model.shape, _shared(candidates)
        whole = shared is not None and np.array_equal(shared, np.arange(shape.num_items))
        at_once = max(1, min(256, _LOGITS_AT_ONCE // shape.num_items))
        scores: list[Floats] = []
        for start in range(0, len(histories), at_once):
            batch = history_batch(histories[start : start + at_once], shape.max_length).to(self._device)
            logps = last_scores(self._model, batch).double().log_softmax(dim=-1).cpu().numpy()  # (B, I)
            if shared is not None:
                scores += [*(logps if whole else logps[:, shared])]
            else:
                scores += [row[items] for row, items in zip(logps, candidates[start : start + at_once], strict=True)]
        return scores


def _shared(candidates: Sequence[I32]) -> I32 | None:
    """The candidates, if all histories have the same array; a copy of the scores for each would take as long as the model."""
    return candidates[0] if len(candidates) and all(items is candidates[0] for items in candidates) else None
