"""Preference rows: a prompt, the chosen completion, and any number of rejected ones.

They are read from JSON (an array, or one object per line, also .gz), Parquet or csv, in any of these layouts:

    prompt, chosen, rejected                 rejected is a text or a list of texts
    prompt, chosen, rejected1..K             or rejected_1..K; empty ones are left out
    prompt, completions                      a list of texts; the first is the chosen one
    historyList, itemList, trueSelection     the titles of S-DPO and LLaRA; TEMPLATE makes the prompt

Rows are read one at a time, except that a JSON array is read whole.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rec_dist.data.dataset.schema import PreferenceRow
from rec_dist.data.sources.blocks import GZIP_FAULTS, files_of, first_bytes, is_packed, kind_of
from rec_dist.data.sources.header import refuse_twins
from rec_dist.data.sources.interactions import BadRows
from rec_dist.errors import UserError

TEMPLATE = "A user liked:\n{history}\nThe next one is among:\n{candidates}\nThe next one: "
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv")
_NUMBERED = re.compile(r"rejected_?([0-9]{1,9})")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"
_HISTORY_SEPARATOR = "::"


class UnusableRowError(Exception):
    """Says why a row cannot be used."""


def find_preferences(source: Path) -> list[Path]:
    """Finds the one file of preference rows that `source` is or holds. Raises UserError if there are several."""
    found = [path for path in files_of(source) if kind_of(path) in SUFFIXES]
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise UserError(
            f"data.source ({source}) holds {len(found)} files of rows ({names}); name one of them instead of the folder."
        )
    return found


def read_preferences(path: Path, bad: BadRows) -> Iterator[PreferenceRow]:
    """Yields the usable rows of a file in order and adds the others to `bad`. Raises UserError if the file is unreadable."""
    for line, fields in _records(path):
        try:
            if not isinstance(fields, dict):
                raise UnusableRowError("not a JSON object")
            if None in fields:  # csv: an unquoted comma in a text would cut the rest off
                raise UnusableRowError("more cells than columns")
            yield as_preference(fields)
        except UnusableRowError as fault:
            shown = fields if isinstance(fields, str) else json.dumps(fields, ensure_ascii=False, default=str)
            bad.add(str(fault), path, np.array([line]), shown)


def as_preference(fields: Mapping[str, Any]) -> PreferenceRow:
    """Converts one row in any of the layouts. Raises UnusableRowError if that fails."""
    if "trueSelection" in fields and "itemList" in fields:
        return _of_candidates(fields)
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise UnusableRowError("prompt is not a text")
    if fields.get("completions") is not None:
        return _checked(prompt, _texts(fields["completions"], "completions"))
    chosen = fields.get("chosen")
    if not isinstance(chosen, str) or not chosen:
        raise UnusableRowError("chosen is not a text")
    numbered = sorted((int(match[1]), name) for name in fields if (match := _NUMBERED.fullmatch(name)))
    if fields.get("rejected") is not None:
        rejected = _texts(fields["rejected"], "rejected")
    else:
        rejected = _texts([fields[name] for _, name in numbered if fields[name]], "rejected")
    return _checked(prompt, [chosen, *rejected])


def _of_candidates(fields: Mapping[str, Any]) -> PreferenceRow:
    history, chosen = fields.get("historyList"), fields["trueSelection"]
    if isinstance(history, str):
        history = history.split(_HISTORY_SEPARATOR)
    if not isinstance(chosen, str) or not chosen:
        raise UnusableRowError("trueSelection is not a text")
    titles, candidates = _texts(history, "historyList"), _texts(fields["itemList"], "itemList")
    prompt = TEMPLATE.replace("{history}", "\n".join(f"- {title}" for title in titles))
    prompt = prompt.replace("{candidates}", "\n".join(f"- {title}" for title in candidates))
    return _checked(prompt, [chosen, *(title for title in candidates if title != chosen)])


def _texts(value: Any, name: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) and text for text in values):
        raise UnusableRowError(f"{name} is neither a text nor a list of texts")
    return values


def _checked(prompt: str, completions: list[str]) -> PreferenceRow:
    if len(completions) < 2:
        raise UnusableRowError("no rejected completion")
    if completions[0] in completions[1:]:
        raise UnusableRowError("the chosen completion is also rejected")
    if any(_SURROGATE.search(text) for text in (prompt, *completions)):
        raise UnusableRowError("half of a surrogate pair, which is not valid text")
    return PreferenceRow(prompt, list(dict.fromkeys(completions)))


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line or number of the row, its fields). For a line that is not JSON, yields its text."""
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet(path)
        return
    begin = first_bytes(path).removeprefix(_BOM).lstrip()
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            if kind in (".csv", ".tsv"):
                reader = csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")
                refuse_twins(path, reader.fieldnames or ())
                yield from ((reader.line_num, row) for row in reader)
            elif begin.startswith(b"["):
                yield from enumerate(json.load(text), start=1)
            else:
                yield from ((number, _json(line)) for number, line in enumerate(text, start=1) if line.strip())
    except UserError:
        raise
    except GZIP_FAULTS as fault:
        raise UserError(f"{path} cannot be decompressed ({fault}); download the file again.") from None
    except csv.Error as fault:  # a cell of more than 131,072 characters, or invalid line ends
        raise UserError(f"{path} cannot be read as csv ({fault}); write the rows as JSON lines.") from None
    except (ValueError, RecursionError) as fault:  # an array that is not JSON, or bytes that are not UTF-8
        raise UserError(f"{path} cannot be read ({fault}); correct the file.") from None


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line.strip()


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            refuse_twins(path, file.schema_arrow.names)
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as fault:
        raise UserError(f"{path} is not a Parquet file ({' '.join(str(fault).split())}); write the file again.") from None
