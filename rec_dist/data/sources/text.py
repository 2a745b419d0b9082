"""Text as people and pages write it: what is cleaned, when two texts are the same, and lists that were written as text.

Cleaning decodes HTML entities (`&amp;`), removes zero-width characters, and composes to NFC, so that the four ways to store
`Café` are one text. Cost: 0.1 us a plain text, 3 us one with an entity.
"""

import ast
import html
import io
import json
import re
import tokenize
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of a surrogate pair, which no file of text can hold
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_ZERO_WIDTH = re.compile("[\u200b-\u200d\u2060\ufeff]")
_LIST = re.compile(r"\s*\[\s*(?:(['\"]).*['\"]\s*,?\s*)?\]\s*", re.DOTALL)
_SHOWN = 60


def decoded(text: str) -> str:
    """The text without HTML entities. Only those that end with a semicolon are one: `?a=1&copy=2` is none."""
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text) if "&" in text else text


def clean(text: str) -> str:
    """The text in NFC, without entities and zero-width characters. White space stays."""
    text = decoded(text)
    return text if text.isascii() else unicodedata.normalize("NFC", _ZERO_WIDTH.sub("", text))


def same(text: str) -> str:
    """What texts that a reader takes for the same have in common: cleaned, with single blanks."""
    return " ".join(clean(text).split())


@dataclass
class Cleaning:
    """Cleans texts, and counts those that change by what was wrong with them. what: the texts, for messages."""

    what: str
    on: bool = True
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def __call__(self, text: str) -> str:
        """The cleaned text, or the text itself if cleaning is off (data.clean_text)."""
        if not self.on:
            return text
        found = decoded(text)
        if found != text:
            self._count("hold HTML entities, which are decoded", text)
        if found.isascii():
            return found
        shown = _ZERO_WIDTH.sub("", found)
        if shown != found:
            self._count("hold zero-width characters, which are removed", text)
        composed = unicodedata.normalize("NFC", shown)
        if composed != shown:
            self._count("are not in Unicode's form NFC, and are composed", text)
        return composed

    def _count(self, reason: str, text: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, text)

    def notes(self) -> list[str]:
        """A line for each reason."""
        return [
            f"{count} {self.what} {reason} (the first: {ascii(self.first[reason])[:_SHOWN]}); data.clean_text=false keeps them"
            for reason, count in self.counts.items()
        ]


class NoListError(Exception):
    """A text that looks like a list and cannot be read as one."""


def parsed_list(text: str, *, whole_numbers: bool = False) -> list[Any] | None:
    """The list that a text holds as JSON or as a Python literal; None if it is a text that is no list.

    whole_numbers: whether [1, 2] is a list too. Raises NoListError for a text that looks like a list and is none, such as a
    NumPy array, whose texts have no commas between.
    """
    looks = text.strip().startswith("[") and text.strip().endswith("]") if whole_numbers else _LIST.fullmatch(text)
    if not looks:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _literal(text.strip())
    if not isinstance(value, list):
        raise NoListError(f"{text[:_SHOWN]!r} looks like a list and is neither JSON nor a Python literal")
    return value


def _literal(text: str) -> Any:
    try:
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        kinds = [kind for kind in kinds if kind not in (tokenize.NL, tokenize.NEWLINE)]
        if _side_by_side(kinds):  # Python would join the two texts
            return None
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        return None


def _side_by_side(kinds: Iterable[int]) -> bool:
    before = None
    for kind in kinds:
        if kind == before == tokenize.STRING:
            return True
        before = kind
    return False
