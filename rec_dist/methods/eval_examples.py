"""The examples that the section `evaluate` describes: a split of the prepared data, or the questions of a file."""

import numpy as np

from rec_dist.config.paths import absolute
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExamples, build_eval_examples, low_rated_users
from rec_dist.evaluation.questions import QuestionFile, build_question_examples, find_questions


def eval_examples_of(config: RunConfig, data: PreparedData) -> EvalExamples:
    """The examples that the section `evaluate` describes.

    Raises UserError as build_eval_examples and build_question_examples do.
    """
    settings = config.evaluate
    file = question_file(config)
    if file is not None:
        asked = build_question_examples(
            data,
            file.path,
            num_candidates=settings.num_candidates,
            max_users=settings.max_users,
            seed=settings.seed,
            exclude_seen=settings.exclude_seen,
        )
        _check_listed(config, asked)
        return asked
    asked = build_eval_examples(
        data,
        split=settings.split,
        num_candidates=settings.num_candidates,
        max_users=settings.max_users,
        seed=settings.seed,
        exclude_seen=settings.exclude_seen,
        targets=settings.targets,
        low_rated=settings.negatives == "low_rated",
    )
    _check_listed(config, asked)
    return asked


def _check_listed(config: RunConfig, examples: EvalExamples) -> None:
    """UserError: a question brings more or fewer candidates than the prompt lists."""
    if config.prompt.candidates != "listed":
        return
    listed = config.prompt.num_candidates
    for example in examples:
        if example.given and len(example.candidates) != listed:
            raise UserError(
                f"evaluate: question {example.position} has {len(example.candidates)} candidates, and "
                f"prompt.num_candidates ({listed}) must equal that when the prompt lists them"
            )


def left_out_users(config: RunConfig, data: PreparedData, examples: EvalExamples) -> int | None:
    """How many users of the split evaluate.negatives=low_rated cannot ask; None for other candidates."""
    if config.evaluate.negatives != "low_rated":
        return None
    rows, most = data.split(config.evaluate.split), config.evaluate.max_users
    usable = len(low_rated_users(data, rows))
    drawn = usable if most is None else min(most, usable)
    return len(rows) - usable + drawn - len(np.unique(examples.users))


def question_file(config: RunConfig) -> QuestionFile | None:
    """The file that evaluate.questions names; None if a split is asked. Raises UserError as find_questions does."""
    place = config.evaluate.questions
    if place is None:
        return None
    for key, value, usual, why in (
        ("targets", config.evaluate.targets, "last", "whose rows have one target"),
        ("negatives", config.evaluate.negatives, "uniform", "whose users need not be those of data.path"),
    ):
        if value != usual:
            raise UserError(f"evaluate.{key}={value} has no effect on evaluate.questions, {why}; remove it")
    return find_questions(absolute(place), config.data.format, config.data.category)
