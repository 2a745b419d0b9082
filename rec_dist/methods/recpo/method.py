"""RecPO (arXiv 2506.02261): the margin of S-DPO by which a rejected item has to fall behind, from ratings and recency.

    margin_i = margin * phi(chosen) / phi(rejected_i),  phi(item) = rating / (1 + delay)^decay

delay: how many items after the chosen one the user takes the item; 0 for the chosen one itself. A rejected item that its user
never takes within the split has a rating and a delay of the configuration. The paper's text gives no numbers that we could
see; these are those of the authors' code, github.com/HoytWen/RecPO.

G groups, K negatives of a group, R different rows, H items of these rows.
"""

from dataclasses import dataclass

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import SequenceSplit, open_data
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.method import LanguageModelMethod
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.preference.objectives import recpo
from rec_dist.methods.recpo.config import RecpoConfig
from rec_dist.methods.task import Task
from rec_dist.runtime.arrays import F32, F64, I32, I64


@dataclass(frozen=True)
class RecencyMargins:
    """Implements methods.language_model.objective.Margins."""

    settings: RecpoConfig

    def __call__(self, split: SequenceSplit, keys: I64, completions: I32) -> F32:
        """The margins of groups: keys (G,), completions (G, 1 + K) item ids -> (G, 1 + K); those of chosen items are 0.

        A key names the target: the position of the chosen item among all items of the split.
        """
        if not len(keys):
            return np.zeros(completions.shape, dtype=np.float32)
        places = keys % split.num_items
        rows = np.searchsorted(split.offsets, places, side="right") - 1
        ratings, delays = self._later(split, rows, places - split.offsets[rows], completions)
        values = ratings / (1.0 + delays) ** self.settings.decay
        margins = self.settings.margin * values[:, :1] / values
        margins[:, 0] = 0.0
        return margins.astype(np.float32)

    def _later(self, split: SequenceSplit, rows: I64, positions: I64, completions: I32) -> tuple[F64, I64]:
        """(ratings, delays) of the completions (G, 1 + K), for targets at positions (G,) of rows (G,)."""
        used, owner = np.unique(rows, return_inverse=True)  # (R,), (G,)
        parts = [split.items_of(row) for row in used.tolist()]
        items = np.concatenate(parts)  # (H,)
        starts = np.cumsum([0, *(len(part) for part in parts)])  # (R+1,)
        width = 1 + max(int(items.max()), int(completions.max()))
        codes = items + np.repeat(np.arange(len(parts)), np.diff(starts)) * width  # (H,) one for each pair of row and item
        order = np.argsort(codes, kind="stable")
        wanted = completions + (owner * width)[:, None]
        place = order[np.minimum(np.searchsorted(codes[order], wanted), len(codes) - 1)]
        place[:, 0] = starts[owner] + positions  # the chosen item itself: a user may have had it before
        taken = codes[place] == wanted  # (G, 1 + K)
        delays = np.where(taken, place - (starts[owner] + positions)[:, None], self.settings.unseen_delay)
        assert (delays >= 0).all(), "items before the target are never rejected"
        delays = np.minimum(delays, self.settings.unseen_delay)  # else an item taken late would count less than one never taken
        if not self.settings.ratings:
            return np.ones(wanted.shape), delays
        rated = [ratings for row in used.tolist() if (ratings := split.ratings_of(row)) is not None]  # all of them: see _check
        given = np.concatenate(rated)  # (H,)
        return np.where(taken, given[place].astype(np.float64), self.settings.unseen_rating), delays


class RecPO(LanguageModelMethod):
    """S-DPO with RecencyMargins."""

    name = "recpo"
    section = ("recpo", RecpoConfig)
    takes_preference_rows = False

    def objective(self, config: RunConfig, num_rejected: int) -> Objective:
        """The objective with task.beta and task.recpo."""
        return recpo(RecencyMargins(config.task.section(RecpoConfig)), beta=config.task.beta, num_negatives=num_rejected)

    def build(self, config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
        """As LanguageModelMethod.build. Raises UserError also for data without the ratings that margins need."""
        task = super().build(config, initial, device, split=split)
        _check(config, split)
        return task


def _check(config: RunConfig, split: str) -> None:
    if config.negatives.kind == "low_rated":
        raise UserError(
            "negatives.kind=low_rated draws items whose ratings are not kept, and task.kind=recpo compares ratings; "
            "set it to uniform or popularity"
        )
    if not config.task.section(RecpoConfig).ratings:
        return
    data = open_data(config.data)
    if data.split(split).ratings_of(0) is None:
        raise UserError(
            f"task.kind=recpo compares ratings, and data.path ({config.data.path}) has none; "
            "set task.recpo.ratings=false for margins from recency alone"
        )
    least = data.manifest.settings.get("min_rating")
    if least is None or least <= 0:
        raise UserError(
            f"task.kind=recpo divides by ratings, and data.min_rating was {least} when data.path ({config.data.path}) was "
            "prepared; prepare it with a data.min_rating above 0, or set task.recpo.ratings=false"
        )


RECPO = RecPO()
