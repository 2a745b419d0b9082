"""Tokenises titles and prompt parts into pieces, once per tokenizer. No other module tokenises them.

Prompts are assembled from pieces, never from text. So a title has the same tokens in every history and as every completion, and
training does not tokenise. Cost: about 20k titles per second, 4 bytes per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.data.prompts.plain_text import PlainText, beyond, template_tokens
from rec_dist.data.prompts.short_titles import cut_titles
from rec_dist.errors import UserError, one_line
from rec_dist.runtime.arrays import I32, I64


def load_tokenizer(model_path: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer in a Hugging Face folder. Raises UserError if there is none.

    trust_remote_code: model.trust_remote_code; runs Python code of that folder if the tokenizer needs it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_path), trust_remote_code=trust_remote_code)
    except Exception as fault:  # a damaged file, or a package that is missing: the libraries raise most of Python's errors
        code = "read its code and set model.trust_remote_code=true, or " if "trust_remote_code" in str(fault) else ""
        raise UserError(
            f"model.path ({model_path}) has no tokenizer that loads: {one_line(fault)}; {code}name a model with one"
        ) from fault


def check_vocabulary(tokenizer: Any, ids: Sequence[int] | I32, vocab_size: int) -> None:
    """Raises UserError if a token id of `ids` has no row among the vocab_size rows of the model's embedding.

    A tokenizer may know more tokens than the model has rows, as that of Gemma 3 does, if no text becomes one of them.
    """
    largest = int(np.max(np.asarray(ids, dtype=np.int64), initial=-1))
    if largest >= vocab_size:
        raise UserError(
            f"model.path: its tokenizer makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) of a text, and the "
            f"model's embedding has rows 0 to {vocab_size - 1}; the two belong to different models, or tokens were added without "
            "resize_token_embeddings: name a folder in which they fit"
        )


def begin_tokens(tokenizer: Any) -> list[int]:
    """The tokens that this tokenizer puts before every text: a BOS token, or nothing."""
    return template_tokens(tokenizer)[0]


def piece_tokens(tokenizer: Any, text: str, *, after: str) -> list[int]:
    """The tokens of `text` as it reads directly after `after`.

    SentencePiece tokenizers mark the beginning of a text, so tokenising the piece alone would add a space that is not there.
    Falls back to the piece alone if a token spans the seam.
    """
    if not text:
        return []
    head = tokenizer(after, add_special_tokens=False).input_ids
    piece = beyond(head, tokenizer(after + text, add_special_tokens=False).input_ids)
    return [int(token) for token in (tokenizer(text, add_special_tokens=False).input_ids if piece is None else piece)]


@dataclass(frozen=True)
class TokenTable:
    """The title tokens of I items: item i has tokens[offsets[i] : offsets[i + 1]]. tokens (sum,) int32, offsets (I+1,) int64."""

    tokens: I32
    offsets: I64

    def __getitem__(self, item: int) -> I32:
        return self.tokens[self.offsets[item] : self.offsets[item + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> I64:
        """(I,): the number of tokens of each title."""
        return np.diff(self.offsets)


def build_token_table(tokenizer: Any, titles: Sequence[str], *, after: str, max_tokens: int | None = None) -> TokenTable:
    """Tokenises " title" for every item as it reads after `after` (the item prefix). A special token in a title is plain text.

    max_tokens: of a title; longer ones are cut (short_titles.py). Raises UserError for a title that tokenises to nothing, since it
    could not be scored.
    """
    plain = PlainText(tokenizer)
    head = tokenizer(after, add_special_tokens=False).input_ids

    def pieces_of(titles: Sequence[str]) -> list[list[int]]:
        whole = tokenizer([f"{after} {title}" for title in titles], add_special_tokens=False).input_ids if titles else []
        found = []
        for title, ids in zip(titles, whole, strict=True):
            piece = beyond(head, ids)
            if piece is None:
                piece = tokenizer(f" {title}", add_special_tokens=False).input_ids
            found.append(plain.behind(after, f" {title}", piece))
        return found

    pieces = pieces_of(titles)
    for item, (title, piece) in enumerate(zip(titles, pieces, strict=True)):
        if not piece or not title.strip() or not tokenizer(title.strip(), add_special_tokens=False).input_ids:
            raise UserError(f"item {item} has a title ({title!r}) that tokenises to nothing; give it a title or drop the item")
    plain.say("titles")
    if max_tokens is not None and any(len(piece) > max_tokens for piece in pieces):
        short = cut_titles(titles, [len(piece) for piece in pieces], max_tokens, lambda title: len(pieces_of([title])[0]))
        pieces = pieces_of(short)
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    tokens = np.fromiter((token for piece in pieces for token in piece), dtype=np.int32, count=int(offsets[-1]))
    return TokenTable(tokens, offsets)
