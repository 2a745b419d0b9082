"""What a model and a micro-batch hold: positions and tokens. Training, evaluation, embedding, ranking and planning ask here.

The vocabulary is checked where texts become tokens (data/prompts/tokens.py).

U prompts.
"""

from collections.abc import Sequence

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExample, drawn_users
from rec_dist.runtime.arrays import I64

_SHORTER = "lower prompt.max_history or prompt.num_virtual"


def check_positions(positions: int, most: int | None, *, what: str = "a prompt", way_out: str = _SHORTER) -> None:
    """Raises UserError if `what` may stand beyond the model's last position. most: None without a limit."""
    if most is not None and positions > most:
        raise UserError(f"{what} may take {positions} positions and the model has {most}; {way_out}")


def check_examples(
    builder: PromptBuilder, examples: Sequence[EvalExample], *, max_tokens: int, max_positions: int | None
) -> None:
    """Raises UserError if the prompt of an example with one of its candidates is longer than a micro-batch or than the model.

    Reads the examples only if a bound says that one might be too long.
    """
    if not len(examples) or longest_prompt(builder) <= min(max_tokens, max_positions or max_tokens):
        return
    lengths = example_lengths(builder, examples)
    place = int(lengths.argmax())
    longest, user = int(lengths[place]), examples[place].user_id
    if longest > max_tokens:
        raise UserError(
            f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than a prompt with one candidate ({longest} tokens, user "
            f"{user}); raise it or lower prompt.max_history"
        )
    check_positions(longest, max_positions, what=f"the prompt of user {user}")


def example_lengths(builder: PromptBuilder, examples: Sequence[EvalExample]) -> I64:
    """(U,) rows of each prompt with its longest candidate alone, which is also the positions that it takes."""
    shown = [np.empty(0, dtype=np.int32), *(example.history[-builder.max_history :] for example in examples)]
    prompts = builder.prompt_lengths(np.concatenate(shown), np.cumsum([len(items) for items in shown]))
    titles, pieces, prefix = builder.titles.lengths, builder.pieces, len(builder.pieces.item_prefix)
    if builder.listed:
        words = len(pieces.candidates_header) + len(pieces.answer_header)
        prompts += np.asarray([words + int((titles[e.candidates] + prefix).sum()) for e in examples], dtype=np.int64)
    longest: I64 = prompts + np.asarray([int(titles[e.candidates].max()) for e in examples], dtype=np.int64) + len(pieces.end) - 1
    return longest


def longest_prompt(builder: PromptBuilder, *, answered: bool = True) -> int:
    """Rows of a prompt if its history were full and every title as long as the longest. answered: with one candidate."""
    titles = int(builder.titles.lengths.max()) + len(builder.pieces.item_prefix)
    return _frame(builder, answered=answered) + builder.max_history * titles


def _frame(builder: PromptBuilder, *, answered: bool) -> int:
    """The same without the history."""
    pieces, longest = builder.pieces, int(builder.titles.lengths.max())
    if not answered:
        return len(pieces.begin)
    listed = len(pieces.candidates_header) + builder.listed * (longest + len(pieces.item_prefix)) + len(pieces.answer_header)
    return len(pieces.begin) + listed + len(pieces.tail) + longest + len(pieces.end) - 1


def check_evaluation(config: RunConfig, builder: PromptBuilder, data: PreparedData, *, answered: bool = True) -> None:
    """Raises UserError for a training run whose model the section `evaluate` could not evaluate.

    answered: whether a prompt is followed by a candidate's title, as where titles are scored, or ends with the history. Reads the
    rows of the split only if a bound says that one might be too long, and counts the longest title as each answer.
    """
    check_listed(config)
    most, settings = config.train.max_tokens_per_micro_batch, config.evaluate
    if longest_prompt(builder, answered=answered) <= most or settings.questions is not None:
        return
    rows = data.split(settings.split)
    if not len(rows):
        return
    asked = np.flatnonzero(np.isin(rows.user_ids, drawn_users(rows.user_ids, settings.max_users, settings.seed)))
    sizes = np.diff(rows.offsets)[asked]
    first = sizes - 1 if settings.targets == "last" else rows.first_target[asked].astype(np.int64)
    starts = offsets_of(sizes)[:-1]
    targets = runs(starts + first, sizes - first)
    begins = np.maximum(np.repeat(starts, sizes - first), targets - builder.max_history)
    tokens = offsets_of(builder.titles.lengths[rows.take(asked, sizes)] + len(builder.pieces.item_prefix))  # before each item
    longest = _frame(builder, answered=answered) + int((tokens[targets] - tokens[begins]).max())
    if longest > most:
        raise UserError(
            f"train.max_tokens_per_micro_batch ({most}) is smaller than a prompt of evaluate.split={settings.split} "
            f"({longest} tokens{' with one candidate' if answered else ''}), so that the model could not be evaluated; raise it or "
            "lower prompt.max_history"
        )


def check_listed(config: RunConfig) -> None:
    """Raises UserError if the prompt lists more or fewer candidates than an evaluation ranks."""
    if config.prompt.candidates == "listed" and config.evaluate.num_candidates != config.prompt.num_candidates:
        raise UserError(
            f"evaluate.num_candidates ({config.evaluate.num_candidates}) must equal prompt.num_candidates "
            f"({config.prompt.num_candidates}) when the prompt lists the candidates"
        )
