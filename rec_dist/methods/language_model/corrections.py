"""Corrections of a title's log-likelihood for what it owes to the title alone (evaluate.title_prior and evaluate.length_power).

    score(i) = (log p(title i | history) - title_prior * log p(title i | no history)) / tokens(i) ** length_power

A likely title gets a high score after any history, and a long one a low score. Both values can be chosen on the validation split:
the pair of the grid with the largest ndcg@10. Cost: one pass over the catalogue's titles, kept beside the results, and with
`valid` one evaluation of the validation users.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rec_dist.config.evaluate import EvaluateConfig
from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.metrics import ndcg, target_ranks
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.files import atomic_path

F32 = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
PRIORS, POWERS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 1.0)  # the smallest of equally good values is taken
VALIDATION_USERS = 1000
_CUTOFF = 10


@dataclass(frozen=True)
class Titles:
    """The catalogue without a history: logps (I,) of the titles in nats, lengths (I,) in tokens, the end included."""

    logps: F32
    lengths: I64


@dataclass(frozen=True)
class Correction:
    """The two values of the formula."""

    title_prior: float
    length_power: float

    def apply(self, scores: npt.NDArray[np.floating[Any]], items: I32, titles: Titles) -> Floats:
        """The scores (C,) of `items` (C,), corrected."""
        own = scores.astype(np.float64) - self.title_prior * titles.logps[items]
        corrected: Floats = own / titles.lengths[items].astype(np.float64) ** self.length_power
        return corrected


def fixed(settings: EvaluateConfig) -> Correction | None:
    """The correction, or None if a value is chosen on the validation split."""
    prior, power = settings.title_prior, settings.length_power
    return None if prior == "valid" or power == "valid" else Correction(prior, power)


def check(config: RunConfig) -> None:
    """Raises UserError for a prompt that lists its candidates, without which a title has no log-likelihood."""
    if config.evaluate.corrects and config.prompt.candidates == "listed":
        raise UserError(
            "evaluate.title_prior and evaluate.length_power have no effect when the prompt lists the candidates; remove them"
        )


def bare_catalogue(num_items: int) -> EvalExample:
    """The question whose scores are Titles.logps: all items after no history."""
    return EvalExample(0, 0, 0, np.empty(0, dtype=np.int32), np.arange(num_items, dtype=np.int32))


def choose(
    settings: EvaluateConfig, examples: Sequence[EvalExample], scores: Sequence[npt.NDArray[np.floating[Any]]], titles: Titles
) -> Correction:
    """The correction with the largest ndcg@10 on questions of the validation split; a value that is given is kept."""
    priors = PRIORS if settings.title_prior == "valid" else (settings.title_prior,)
    powers = POWERS if settings.length_power == "valid" else (settings.length_power,)
    found = [Correction(*pair) for pair in product(priors, powers)]
    means = [_mean_ndcg(correction, examples, scores, titles) for correction in found]
    return found[int(np.argmax(means))]


def validation_config(config: RunConfig) -> RunConfig:
    """The configuration whose section `evaluate` describes the questions that values are chosen on, uncorrected."""
    users = config.evaluate.max_users
    changes = {
        "split": "valid",
        "questions": None,
        "max_users": VALIDATION_USERS if users is None else min(users, VALIDATION_USERS),
        "title_prior": 0.0,
        "length_power": 0.0,
    }
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})


def kept_logps(folder: Path, key: str) -> F32 | None:
    """Titles.logps that keep_logps() wrote into `folder` under this key; None if they are not there."""
    path = _path(folder, key)
    return np.load(path) if path.is_file() else None


def keep_logps(folder: Path, key: str, logps: F32) -> None:
    """Writes Titles.logps. key: of all that they depend on."""
    with atomic_path(_path(folder, key)) as temporary, temporary.open("wb") as file:
        np.save(file, logps)


def _path(folder: Path, key: str) -> Path:
    return folder / f"title-prior-{key}.npy"


def _mean_ndcg(
    correction: Correction, examples: Sequence[EvalExample], scores: Sequence[npt.NDArray[np.floating[Any]]], titles: Titles
) -> float:
    ranks = [
        target_ranks(correction.apply(own, e.candidates, titles)[None], int(np.flatnonzero(e.candidates == e.target)[0]))
        for e, own in zip(examples, scores, strict=True)
    ]
    return float(ndcg(np.concatenate(ranks), _CUTOFF).mean())
