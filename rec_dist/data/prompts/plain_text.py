"""Text of data as tokens. A special token of the tokenizer in it (`</s>`, `<|im_end|>`) is characters like all others.

Otherwise a title could end a completion, or speak as another role of a chat. What templates and the section `prompt` add is control
and is not encoded here. Cost: a look at the tokens of each text; only texts that hold such a token are encoded twice.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rec_dist.errors import UserError

logger = logging.getLogger(__name__)

_NAMED = 5  # tokens in a message


def template_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that this tokenizer puts before and behind every text, such as a BOS token."""
    whole, text = list(tokenizer("a")["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    at = next((at for at in range(len(whole)) if whole[at : at + len(text)] == text), 0)
    return whole[:at], whole[at + len(text) :]


def beyond(head: Sequence[int], whole: Sequence[int]) -> list[int] | None:
    """The tokens of a piece as it reads behind a head. whole: of both together. None if a token spans the seam."""
    return list(whole[len(head) :]) if whole[: len(head)] == head else None


class PlainText:
    """Encodes texts without special tokens, and counts those that hold one. found: the tokens and in how many texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        unknown = getattr(tokenizer, "unk_token_id", None)
        ends = (getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "bos_token_id", None))
        # What a text that the tokenizer does not know becomes. GPT-2 has none: its unk_token is its end token.
        self._unknown = None if unknown in ends else unknown
        self._special = {int(number) for number, token in added.items() if token.special}
        self._special |= {int(number) for number in getattr(tokenizer, "all_special_ids", [])}
        names = {tokenizer.convert_ids_to_tokens(number) for number in self._special} if self._special else set()
        names |= {token.content for token in added.values() if token.special}
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.found: Counter[str] = Counter()
        self.num_texts = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        as_read = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [self.without_special(text, list(ids)) for text, ids in zip(texts, as_read, strict=True)]

    def with_template(self, texts: Sequence[str]) -> list[list[int]]:
        """As __call__, with the tokens that the tokenizer adds before and behind a text, such as a BOS token."""
        before, behind = template_tokens(self._tokenizer)
        found = []
        for text, ids in zip(texts, self._tokenizer(list(texts))["input_ids"] if texts else [], strict=True):
            body = list(ids[len(before) : len(ids) - len(behind)])
            plain = self.without_special(text, body)
            found.append(list(ids) if plain is body else [*before, *plain, *behind])
        return found

    def without_special(self, text: str, as_read: list[int]) -> list[int]:
        """The tokens of a text. as_read: those that the tokenizer makes of it, which may be special."""
        if self._special.isdisjoint(as_read):
            return as_read
        ids = self._encode(text)
        if ids != as_read:
            self._count(text)
        return ids

    def behind(self, after: str, text: str, as_read: list[int]) -> list[int]:
        """The tokens of `text` as it reads directly after `after`, which is control. as_read: as for without_special."""
        if self._special.isdisjoint(as_read):
            return as_read
        ids = beyond(self._encode(after), self._encode(after + text))
        if ids is None:
            ids = self._encode(text)
        if ids != as_read:
            self._count(text)
        return ids

    def say(self, what: str, way_out: str = "") -> None:
        """Logs how many texts held special tokens, and which."""
        if self.num_texts:
            named = ", ".join(f"{name} in {count}" for name, count in self.found.most_common(_NAMED))
            logger.warning(
                f"{self.num_texts} {what} hold special tokens of the tokenizer ({named}); they are read as text{way_out}"
            )

    def _count(self, text: str) -> None:
        self.num_texts += 1
        self.found.update(set(self._names.findall(text)))

    def _encode(self, text: str) -> list[int]:
        ids = self._split(text)
        if self._is_plain(ids):
            return ids
        # A vocabulary of Unigram or of whole words holds its special tokens as ordinary pieces, so such a text is cut inside them.
        cut = self._names.sub(lambda name: f"{name[0][:1]}\0{name[0][1:]}", text)
        for parts in ([] if "\0" in text else cut.split("\0"), list(text)):
            ids = [token for part in parts if part for token in self._split(part)]
            if ids and self._is_plain(ids):
                return ids
        raise UserError(
            f"this tokenizer makes a special token of {text!r:.80} in whatever way it is cut; take it out of the text"
        )

    def _is_plain(self, ids: list[int]) -> bool:
        return self._special.isdisjoint(token for token in ids if token != self._unknown)

    def _split(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
