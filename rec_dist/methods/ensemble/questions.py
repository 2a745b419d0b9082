"""The questions that an ensemble learns its weights from: targets of the validation split, among the whole catalogue or a draw.

No member was fitted to them, as members train on the train split. Candidates are drawn by hash and never proposed by a member,
whose weight would then turn negative.

Q questions, C candidates, I items of the catalogue, F features.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.sampling.negatives import draw_candidates
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExample, build_eval_examples
from rec_dist.methods.ensemble.config import EnsembleConfig
from rec_dist.methods.ensemble.weights import Questions
from rec_dist.methods.method import Scores
from rec_dist.runtime.rng import hash_u64

_MOST_VALUES = 1 << 29  # float32 features held at once: 2 GiB
_FEWEST_QUESTIONS = 50
_DRAWS = 12  # a stream of draws of its own


def validation_config(config: RunConfig, settings: EnsembleConfig, max_questions: int) -> RunConfig:
    """The configuration whose section `evaluate` describes the questions, for members whose workers build them again."""
    changes = {
        "split": "valid",
        "num_candidates": settings.num_candidates,
        "ranker": "model",
        "max_users": max_questions,
    }
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})


def validation_questions(config: RunConfig, data: PreparedData, *, every_target: bool) -> list[EvalExample]:
    """The questions that validation_config() describes. Raises UserError if the split has no user.

    every_target: all targets of a user, not the last alone, up to evaluate.max_users of them.
    """
    if not len(data.split("valid")):
        raise UserError(f"the valid split of {data.location} has no user to learn weights from; prepare data whose split has one")
    settings = config.evaluate
    if every_target:
        assert settings.max_users is not None, "validation_config() sets it"
        return _every_target(data, settings.num_candidates, settings.max_users, settings.seed)
    return build_eval_examples(
        data, split="valid", num_candidates=settings.num_candidates, max_users=settings.max_users, seed=settings.seed
    )


def affordable(num_candidates: int, wanted: int, num_features: int) -> int:
    """How many questions fit into memory, `wanted` at most. Raises UserError if they are too few."""
    number = min(wanted, _MOST_VALUES // (num_candidates * num_features))
    if number < min(wanted, _FEWEST_QUESTIONS):
        raise UserError(
            f"task.kind=ensemble has room for {number} questions of {num_candidates:,} items and {num_features} features; set "
            "task.ensemble.num_candidates=10000, or name fewer members"
        )
    return number


def _every_target(data: PreparedData, num_candidates: int | str, max_questions: int, seed: int) -> list[EvalExample]:
    rows = data.split("valid")
    counts = np.diff(rows.offsets) - rows.first_target
    users = np.repeat(np.arange(len(rows)), counts)
    begins = np.repeat(np.cumsum(counts) - counts, counts)
    positions = np.arange(len(users)) - begins + rows.first_target[users]
    order = np.argsort(hash_u64(seed, _DRAWS, rows.user_ids[users], positions), kind="stable")
    whole = np.arange(data.num_items, dtype=np.int32)
    examples = []
    for place in np.sort(order[:max_questions]).tolist():
        row, position = int(users[place]), int(positions[place])
        items, user = rows.items_of(row), int(rows.user_ids[row])
        history, target = items[:position], int(items[position])
        if isinstance(num_candidates, int):
            candidates = draw_candidates(
                seed=seed,
                user=user,
                position=position,
                target=target,
                history=history,
                num=num_candidates,
                num_items=data.num_items,
            )
        else:
            candidates = whole
        examples.append(EvalExample(user, position, target, history, candidates))
    return examples


class QuestionTable:
    """Collects the features of Q questions over at most C candidates, part by part."""

    def __init__(self, examples: Sequence[EvalExample], names: Sequence[str]) -> None:
        self._names = names
        sizes = np.asarray([len(example.candidates) for example in examples])
        self._ranked = np.arange(sizes.max()) < sizes[:, None]  # (Q, C)
        self._features = np.zeros((*self._ranked.shape, len(names)), dtype=np.float32)
        self._targets = np.asarray([int(np.flatnonzero(e.candidates == e.target)[0]) for e in examples])

    def fill(self, begin: int, features: dict[str, Scores]) -> None:
        """Takes the features of the questions from `begin` on."""
        for column, name in enumerate(self._names):
            for place, scores in enumerate(features[name], start=begin):
                self._features[place, : len(scores), column] = scores

    def questions(self) -> Questions:
        """All of them."""
        return Questions(self._features, self._targets, self._ranked)


def blocks_of(examples: Sequence[EvalExample], most_values: int | None) -> Iterator[slice]:
    """Consecutive examples with at most `most_values` candidates together, or single ones; None: all at once."""
    begin, held = 0, 0
    for place, example in enumerate(examples):
        if most_values is not None and held + len(example.candidates) > most_values and place > begin:
            yield slice(begin, place)
            begin, held = place, 0
        held += len(example.candidates)
    if begin < len(examples):
        yield slice(begin, len(examples))
