"""Texts that a caller gives as strings or as token ids, as checked token ids."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32

Text = str | Sequence[int] | npt.NDArray[np.int64] | Tensor


def check_tokenizer(tokenizer: Any, texts: list[Text]) -> None:
    """Raises UserError for something that is no tokenizer, or none where a text is a string."""
    if tokenizer is None and any(isinstance(text, str) for text in texts):
        raise UserError("prompts or completions hold strings and tokenizer is None; give the model's tokenizer, or token ids")
    if tokenizer is not None and not callable(tokenizer):
        raise UserError(f"tokenizer is of type {type(tokenizer).__name__}; give the model's tokenizer, or None with token ids")


def token_ids(
    texts: Sequence[Text], tokenize: Callable[[list[str]], Any], num_ids: int, name_of: Callable[[int], str]
) -> list[I32]:
    """Each text as token ids, of which the model has `num_ids`. tokenize: strings -> their ids. name_of: a text's name in messages.

    Raises UserError for a text without tokens, one that is neither a string nor ids, and an id that the model does not have.
    """
    for number, text in enumerate(texts):
        if isinstance(text, str) and (half := re.search("[\ud800-\udfff]", text)):
            raise UserError(
                f"{name_of(number)} holds half a character (U+{ord(half[0]):04X} at place {half.start()}), which is no text; "
                "decode it with errors='replace'"
            )
    words = [text for text in texts if isinstance(text, str)]
    tokenized = iter(tokenize(words) if words else [])
    found = []
    for number, text in enumerate(texts):
        given = next(tokenized) if isinstance(text, str) else text
        try:
            ids = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
        except ValueError:  # lists of different lengths
            ids = np.asarray(given, dtype=object)
        if ids.size == 0:
            raise UserError(f"{name_of(number)} ({text!r:.60}) has no tokens; leave it out, or give at least one")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(f"{name_of(number)} ({text!r:.60}) must be a string or a flat sequence of whole numbers")
        if len(wrong := ids[(ids < 0) | (ids >= num_ids)]):
            raise UserError(
                f"{name_of(number)} holds the token id {wrong[0]} and the model has ids 0 to {num_ids - 1}; "
                "use the model's tokenizer"
            )
        found.append(ids.astype(np.int32))
    return found
