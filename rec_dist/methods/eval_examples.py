"""The examples that the section `evaluate` describes: a split of the prepared data, or the questions of a file."""

from rec_dist.config.paths import absolute
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExamples, build_eval_examples
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
    return build_eval_examples(
        data,
        split=settings.split,
        num_candidates=settings.num_candidates,
        max_users=settings.max_users,
        seed=settings.seed,
        exclude_seen=settings.exclude_seen,
        targets=settings.targets,
    )


def _check_listed(config: RunConfig, examples: EvalExamples) -> None:
    """UserError: a question brings more or fewer candidates than the prompt lists."""
    if config.prompt.candidates != "listed":
        return
    listed = config.prompt.num_candidates
    for example in examples:
        if example.given and len(example.candidates) != listed:
            raise UserError(
                f"evaluate.questions: question {example.position} has {len(example.candidates)} candidates, and "
                f"prompt.num_candidates ({listed}) must equal that when the prompt lists them"
            )


def question_file(config: RunConfig) -> QuestionFile | None:
    """The file that evaluate.questions names; None if a split is asked. Raises UserError as find_questions does."""
    place = config.evaluate.questions
    if place is None:
        return None
    if config.evaluate.targets != "last":
        raise UserError(
            f"evaluate.targets={config.evaluate.targets} has no effect on evaluate.questions, whose rows have one target; remove it"
        )
    return find_questions(absolute(place), config.data.format, config.data.category)
