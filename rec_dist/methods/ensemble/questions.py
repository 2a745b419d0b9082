"""The questions that an ensemble learns its weights from: targets of the validation split, among the whole catalogue or a draw.

No member was fitted to them, as members train on the train split. Candidates are drawn by hash and never proposed by a member,
whose weight would then turn negative.

Q questions, C candidates, I items of the catalogue, F features.
"""

from collections.abc import Sequence

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import Floats
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.ensemble.config import EnsembleConfig
from rec_dist.methods.ensemble.rerank import Retrieval, best_places
from rec_dist.methods.ensemble.weights import Questions
from rec_dist.runtime.arrays import I64

_MOST_VALUES = 1 << 29  # float32 features held at once: 2 GiB
_FEWEST_USERS = 50


def validation_config(config: RunConfig, data: PreparedData) -> RunConfig:
    """The configuration whose section `evaluate` describes the questions, which members' workers build from it too.

    Raises UserError if the valid split has no user, or if too few questions fit into memory.
    """
    settings, rows = config.task.section(EnsembleConfig), data.split("valid")
    if not len(rows):
        raise UserError(f"the valid split of {data.location} has no user to learn weights from; prepare data whose split has one")
    if settings.num_candidates != "all" and settings.num_candidates > data.num_items:
        raise UserError(
            f"task.ensemble.num_candidates ({settings.num_candidates}) is more than the {data.num_items} items of {data.location}; "
            "lower it, or set all"
        )
    num_candidates = data.num_items if settings.num_candidates == "all" else settings.num_candidates
    num_features = 3 * len(settings.members) + len(settings.terms)  # of neighbours a member may have three
    each = rows.num_targets / len(rows) * num_candidates * num_features  # values of a user
    users = min(settings.max_users, len(rows), int(_MOST_VALUES / each))
    if users < min(settings.max_users, len(rows), _FEWEST_USERS):
        raise UserError(
            f"task.kind=ensemble has room for {users} users with {num_candidates:,} candidates and {num_features} features; set "
            "task.ensemble.num_candidates=10000, or name fewer members"
        )
    changes = {
        "split": "valid",
        "targets": "all",
        "questions": None,
        "num_candidates": settings.num_candidates,
        "exclude_seen": False,
        "ranker": "model",
        "max_users": users,
    }
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})


class QuestionTable:
    """Collects the features of Q questions over at most C candidates, block by block in their order."""

    def __init__(self, examples: Sequence[EvalExample]) -> None:
        sizes = np.asarray([len(example.candidates) for example in examples])
        self.names: list[str] = []
        self._ranked = np.arange(sizes.max()) < sizes[:, None]  # (Q, C)
        self._targets = np.asarray([int(np.flatnonzero(e.candidates == e.target)[0]) for e in examples])
        self._features = np.zeros((*self._ranked.shape, 0), dtype=np.float32)
        self._filled = 0

    def add(self, features: dict[str, list[Floats]]) -> None:
        """Takes the features of the next questions."""
        if not self.names:
            self._make_room(features)
        self._fill(features, self._filled)
        self._filled += len(features[self.names[0]])

    def add_features(self, features: dict[str, list[Floats]]) -> None:
        """Takes further features of all questions, after the others."""
        self._make_room(features)
        self._fill(features, 0)

    def places(self, examples: Sequence[EvalExample], retrieval: Retrieval) -> list[I64]:
        """What is retrieved for each question by the features that are there, as places among its candidates."""
        scores = self._features @ retrieval.weights.astype(np.float32)  # (Q, C)
        return [
            best_places(row[: len(e.candidates)].astype(np.float64), e.history, e.candidates, retrieval.num)
            for row, e in zip(scores, examples, strict=True)
        ]

    def questions(self) -> Questions:
        """All of them."""
        return Questions(self._features, self._targets, self._ranked)

    def _make_room(self, features: dict[str, list[Floats]]) -> None:
        self.names += features
        room = np.zeros((*self._ranked.shape, len(features)), dtype=np.float32)
        self._features = np.concatenate([self._features, room], axis=2)

    def _fill(self, features: dict[str, list[Floats]], first: int) -> None:
        for name, rows in features.items():
            column = self.names.index(name)
            for place, scores in enumerate(rows, start=first):
                self._features[place, : len(scores), column] = scores
