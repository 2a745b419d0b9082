"""Preference rows: a prompt, the chosen completion, and any number of rejected ones.

They are read from JSON (an array, or one object per line), Parquet or csv, also packed, in any of these layouts:

    prompt, chosen, rejected                 rejected is a text or a list of texts
    prompt, chosen, rejected1..K             or rejected_1..K; empty ones are left out
    prompt, completions                      a list of texts; the first is the chosen one
    historyList, itemList, trueSelection     the titles of S-DPO and LLaRA; TEMPLATE makes the prompt

A list may be written as text, as csv has it: JSON or a Python literal. Texts are cleaned (text.py), and two are the same if a reader
takes them for the same: after cleaning, with single blanks. Rows are read one at a time, except that a JSON array is read whole.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.data.dataset.schema import PreferenceRow
from rec_dist.data.sources.blocks import files_of
from rec_dist.data.sources.interactions import BadRows, UnusableRowError
from rec_dist.data.sources.packed import plain_suffix
from rec_dist.data.sources.parquet import read_records
from rec_dist.data.sources.records import Record, read_text_records
from rec_dist.data.sources.text import HALF_CHARACTER, Cleaning, NoListError, parsed_list, same
from rec_dist.errors import UserError

TEMPLATE = "A user liked:\n{history}\nThe next one is among:\n{candidates}\nThe next one: "
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv")
_NUMBERED = re.compile(r"rejected_?([0-9]{1,9})")
_HISTORY_SEPARATOR = "::"


def find_preferences(source: Path) -> list[Path]:
    """Finds the one file of preference rows that `source` is or holds. Raises UserError if there are several."""
    found = [path for path in files_of(source) if plain_suffix(path) in SUFFIXES]
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise UserError(
            f"data.source ({source}) holds {len(found)} files of rows ({names}); name one of them instead of the folder."
        )
    return found


class PreferenceReader:
    """Reads rows of any layout.

    cleaning: counts the texts that were cleaned. num_repeated: rejected completions that are the same as another of their row.
    """

    def __init__(self, *, clean_text: bool = True) -> None:
        self.cleaning = Cleaning("texts", clean_text)
        self.num_repeated = 0

    def read(self, path: Path, bad: BadRows) -> Iterator[PreferenceRow]:
        """Yields the usable rows of a file in order and adds the others to `bad`. Raises UserError if the file is unreadable."""
        for record in _records(path):
            try:
                if record.fault is not None:
                    raise UnusableRowError(record.fault)
                yield self._row(record.fields)
            except UnusableRowError as fault:
                shown = record.text or json.dumps(record.fields, ensure_ascii=False, default=str)
                bad.add(str(fault), path, np.array([record.line]), shown)

    def notes(self) -> list[str]:
        """Lines about what was changed."""
        repeated = (
            [f"{self.num_repeated} rejected completions are left out, since their row has them twice"]
            if self.num_repeated
            else []
        )
        return self.cleaning.notes() + repeated

    def _row(self, fields: Mapping[str, Any]) -> PreferenceRow:
        if "trueSelection" in fields and "itemList" in fields:
            return self._of_candidates(fields)
        prompt = self._text(fields, "prompt")
        if fields.get("completions") is not None:
            return self._checked(prompt, self._texts(fields["completions"], "completions"))
        chosen = self._text(fields, "chosen")
        numbered = sorted((int(match[1]), name) for name in fields if (match := _NUMBERED.fullmatch(name)))
        if fields.get("rejected") is not None:
            rejected = self._texts(fields["rejected"], "rejected")
        else:
            rejected = self._texts([fields[name] for _, name in numbered if fields[name]], "rejected")
        return self._checked(prompt, [chosen, *rejected])

    def _of_candidates(self, fields: Mapping[str, Any]) -> PreferenceRow:
        history, chosen = fields.get("historyList"), self._text(fields, "trueSelection")
        if isinstance(history, str) and _as_list(history, "historyList") is None:
            history = history.split(_HISTORY_SEPARATOR) if history.strip() else []
        titles, candidates = self._texts(history, "historyList"), self._texts(fields["itemList"], "itemList")
        if not titles:
            raise UnusableRowError("historyList is empty")
        wanted = same(chosen)
        among = [title for title in candidates if same(title) == wanted]
        if not among:
            raise UnusableRowError("trueSelection is not in itemList")
        prompt = TEMPLATE.replace("{history}", "\n".join(f"- {title}" for title in titles))
        prompt = prompt.replace("{candidates}", "\n".join(f"- {title}" for title in candidates))
        return self._checked(prompt, [among[0], *(title for title in candidates if same(title) != wanted)])

    def _text(self, fields: Mapping[str, Any], name: str) -> str:
        value = fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise UnusableRowError(
                f"{name} is {'missing' if value is None else 'empty' if isinstance(value, str) else 'not a text'}"
            )
        if name != "prompt" and _as_list(value, name) is not None:
            raise UnusableRowError(f"{name} is a list written as text")
        return self._clean(value, name)

    def _texts(self, value: Any, name: str) -> list[str]:
        if isinstance(value, str):
            found = _as_list(value, name)
            value = [value] if found is None else found
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UnusableRowError(f"{name} is neither a text nor a list of texts")
        return [self._clean(text, name) for text in value]

    def _clean(self, text: str, name: str) -> str:
        if HALF_CHARACTER.search(text):
            raise UnusableRowError(f"{name} holds half a character")
        cleaned = self.cleaning(text)
        if not cleaned.strip():
            raise UnusableRowError(f"{name} holds an empty text")
        return cleaned

    def _checked(self, prompt: str, completions: list[str]) -> PreferenceRow:
        if len(completions) < 2:
            raise UnusableRowError("no rejected completion")
        distinct: dict[str, str] = {}
        for text in completions:
            distinct.setdefault(same(text), text)
        if same(completions[0]) in {same(text) for text in completions[1:]}:
            raise UnusableRowError("the chosen completion is also rejected")
        self.num_repeated += len(completions) - len(distinct)
        return PreferenceRow(prompt, list(distinct.values()))


def _as_list(text: str, name: str) -> list[Any] | None:
    try:
        return parsed_list(text)
    except NoListError as fault:
        raise UnusableRowError(f"{name}: {fault}") from None


def _records(path: Path) -> Iterator[Record]:
    if plain_suffix(path) != ".parquet":
        return read_text_records(path)
    return (Record(row, fields) for row, fields in read_records(path, lambda _: None))
