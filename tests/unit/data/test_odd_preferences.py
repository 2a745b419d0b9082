"""Preference rows are checked inside: the chosen one among the candidates and not among the rejected, and lists that are lists."""

import json
from pathlib import Path
from typing import Any

import pytest

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.preferences import PreferenceData
from rec_dist.data.prepare.prepare import prepare
from rec_dist.data.sources.interactions import BadRows
from rec_dist.data.sources.preferences import PreferenceReader
from rec_dist.errors import UserError

CANDIDATES = {"historyList": "A One::B Two", "itemList": ["C Three", "D Four", "E Five"], "trueSelection": "C Three"}
LISTS = {"prompt": "P", "chosen": "A", "rejected": ["B", "C"]}


def read(path: Path) -> tuple[list[list[str]], dict[str, int], list[str]]:
    """The completions of the usable rows, the reasons of the others, and the notes."""
    bad, reader = BadRows(), PreferenceReader()
    rows = [row.completions for row in reader.read(path, bad)]
    return rows, bad.counts, reader.notes()


def of(folder: Path, *rows: dict[str, Any]) -> tuple[list[list[str]], dict[str, int], list[str]]:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read(folder / "a.jsonl")


@pytest.mark.parametrize("chosen", ["C Three", "C Three ", " C  Three", "C\u200b Three", "C&#32;Three"])
def test_the_chosen_candidate_is_found_by_what_it_reads(chosen: str, tmp_path: Path) -> None:
    rows, bad, _ = of(tmp_path, {**CANDIDATES, "trueSelection": chosen})
    assert (rows, bad) == ([["C Three", "D Four", "E Five"]], {})


def test_unicode_forms_of_the_chosen_one_are_not_rejected(tmp_path: Path) -> None:
    rows, bad, notes = of(tmp_path, {**CANDIDATES, "itemList": ["Caf\u00e9", "D"], "trueSelection": "Cafe\u0301"})
    assert (rows, bad) == ([["Caf\u00e9", "D"]], {})
    assert "1 texts are not in Unicode's form NFC" in notes[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**LISTS, "rejected": ["A "]}, "the chosen completion is also rejected"),
        ({**LISTS, "rejected": ["B", "A\ufeff"]}, "the chosen completion is also rejected"),
        ({**LISTS, "rejected": ["", "B"]}, "rejected holds an empty text"),
        ({**LISTS, "rejected": ["B", " \u200b"]}, "rejected holds an empty text"),
        ({**LISTS, "chosen": " "}, "chosen is empty"),
        ({"data": [LISTS]}, "prompt is missing"),
        ({**LISTS, "chosen": "['A']"}, "chosen is a list written as text"),
        ({**LISTS, "completions": ["A", None]}, "completions is neither a text nor a list of texts"),
        ({**CANDIDATES, "trueSelection": "F Six"}, "trueSelection is not in itemList"),
        ({**CANDIDATES, "historyList": ""}, "historyList is empty"),
        ({**CANDIDATES, "historyList": []}, "historyList is empty"),
        ({**CANDIDATES, "historyList": "A::"}, "historyList holds an empty text"),
    ],
)
def test_a_row_that_contradicts_itself_is_bad(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rows, bad, _ = of(tmp_path, row, LISTS)
    assert rows == [["A", "B", "C"]]
    assert bad == {reason: 1}


def test_rejected_ones_that_are_the_same_count_once_and_are_told(tmp_path: Path) -> None:
    rows, bad, notes = of(tmp_path, {**LISTS, "rejected": ["B", "B ", "B", "C"]})
    assert (rows, bad) == ([["A", "B", "C"]], {})
    assert notes == ["2 rejected completions are left out, since their row has them twice"]


@pytest.mark.parametrize("text", ["['C', 'D', \"E's\"]", '["C", "D", "E\'s"]', "[ 'C',\n'D', \"E's\",]"])
def test_lists_written_as_text_are_lists(text: str, tmp_path: Path) -> None:
    cell = text.replace('"', '""')
    (tmp_path / "a.csv").write_text(f'historyList,itemList,trueSelection\n"A::B","{cell}",C\n"[\'A\', \'B\']","{cell}",D\n')
    assert read(tmp_path / "a.csv")[0] == [["C", "D", "E's"], ["D", "C", "E's"]]
    (tmp_path / "b.csv").write_text(f'prompt,chosen,rejected\nPick:,A,"{cell}"\n')
    assert read(tmp_path / "b.csv")[0] == [["A", "C", "D", "E's"]]


def test_a_numpy_array_written_as_text_is_a_bad_row_and_a_title_in_brackets_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nP,A,['C' 'D']\nP,[untitled],[REC]\n")
    rows, bad, _ = read(tmp_path / "a.csv")
    assert rows == [["[untitled]", "[REC]"]]
    (reason,) = bad
    assert "looks like a list and is neither JSON nor a Python literal" in reason


def test_text_behind_a_quote_of_a_csv_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\nP,"A" B,C\nP,A,C\n')
    with pytest.raises(UserError, match=r"a\.csv:2: .* cannot be read as csv"):
        read(tmp_path / "a.csv")


def test_texts_are_stored_cleaned_and_counted_or_kept(tmp_path: Path) -> None:
    row = {"prompt": "Tom &amp; Jerry\n", "chosen": " Cafe\u0301", "rejected": [" B"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = {}
    for clean in (True, False):
        folder = tmp_path / str(clean)
        prepare(DataConfig(source=str(tmp_path / "a.jsonl"), path=str(folder), format="preferences", clean_text=clean))
        data = PreferenceData.open(folder)
        found[clean] = [(row.prompt, row.completions) for rows in data.rows() for row in rows], data.manifest.notes
    assert found[True][0] == [("Tom & Jerry\n", [" Caf\u00e9", " B"])]
    assert "1 texts hold HTML entities" in found[True][1][0]
    assert found[False] == ([("Tom &amp; Jerry\n", [" Cafe\u0301", " B"])], [])
