"""Preference rows, questions and histories are read by one set of rules: encoding, marks, line ends, quotes, bad rows, packing."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rec_dist.data.sources.history_rows import OWN, read_history_rows
from rec_dist.data.sources.interactions import BadRows
from rec_dist.data.sources.listings import read_listings
from rec_dist.data.sources.preferences import PreferenceReader
from rec_dist.data.sources.records import read_text_records
from rec_dist.errors import UserError
from rec_dist.report.write import read_run
from rec_dist.runtime.rows import lines_after, read_rows

ODD = "a\u2028b\x85c\u2029d"  # str.splitlines cuts at each of these, and JSON does not escape them unless asked to
ROW = {"user_id": "u", "history": [ODD, "2"], "target": "3", "prompt": ODD, "chosen": "x", "rejected": "y"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines, an array or csv, by the suffix."""
    if ".csv" in path.name:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_by_all(path: Path) -> tuple[list[Any], list[Any], list[Any], list[dict[str, int]]]:
    bad = [BadRows(), BadRows()]
    preferences = [row.prompt for row in PreferenceReader(clean_text=False).read(path, bad[0])]
    questions = [(row.line, row.user, row.history) for row in read_history_rows(path, bad[1], [OWN])]
    listings = (
        []
        if path.suffix == ".json"
        else [(row.row, row.user, row.names) for row in read_listings(path, "history", "--histories")]
    )
    return preferences, questions, listings, [each.counts for each in bad]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.jsonl.gz"])
def test_a_text_keeps_its_odd_characters(name: str, mark: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / name, [ROW, ROW])
    text = mark + path.read_bytes()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    preferences, questions, listings, bad = read_by_all(path)
    assert preferences == [ODD, ODD]
    lines = [1, 2] if "csv" not in name else [2, 3]
    assert questions == [(line, "u", [ODD, "2"]) for line in lines]
    assert listings in ([], [(line, "u", [ODD, "2"]) for line in lines])
    assert bad == [{}, {}]


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("a.jsonl", b"[1]\n", "not a JSON object"),
        ("a.jsonl", b"{\n", "not a JSON object"),
        ("a.jsonl", b'{"user_id": "\xff"}\n', "not UTF-8 text"),
        ("a.csv", b"one\n", "1 column instead of 6"),
        ("a.csv", b"1,2,3,4,5,6,7\n", "7 columns instead of 6"),
    ],
)
def test_a_bad_row_has_one_reason_and_its_line(name: str, row: bytes, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, [ROW])
    path.write_bytes(path.read_bytes() + b"\n" + row)
    number = path.read_bytes().count(b"\n")
    assert [(r.line, r.fault) for r in read_text_records(path)][-1] == (number, reason)
    bad = [BadRows(), BadRows()]
    assert len(list(PreferenceReader().read(path, bad[0]))) == len(read_history_rows(path, bad[1], [OWN])) == 1
    assert [each.counts for each in bad] == [{reason: 1}, {reason: 1}]
    assert [each.first[reason].line for each in bad] == [number, number]
    with pytest.raises(UserError, match=rf"{name}:{number}: {reason}"):
        list(read_listings(path, "history", "--histories"))


def test_a_row_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('user_id,history\nu,"[""a\n""]"\nv,[]\n')
    assert [record.line for record in read_text_records(tmp_path / "a.csv")] == [2, 4]


def test_quotes_that_are_none_and_other_encodings_are_errors_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('user_id,history,target\nu,"["a"]",b\n')
    (tmp_path / "b.csv").write_bytes("user_id,history,target\nu,[],é\n".encode("latin-1"))
    for name, words in (("a", r"a\.csv:2: .* cannot be read as csv"), ("b", r"b\.csv:2: .* not UTF-8 text")):
        for read in (
            lambda path: list(PreferenceReader().read(path, BadRows())),
            lambda path: read_history_rows(path, BadRows(), [OWN]),
            lambda path: list(read_listings(path, "history", "--histories")),
        ):
            with pytest.raises(UserError, match=words):
                read(tmp_path / f"{name}.csv")


def test_a_fault_of_the_file_is_named_by_its_own_line(tmp_path: Path) -> None:
    """A quote that is never closed by the row that it opens, and a byte that is not UTF-8 by its line, though more has been read."""
    (tmp_path / "a.csv").write_text('user_id,history\nu,"a\nb"\nv,"[2]\n' + "w,[3]\n" * 50)
    with pytest.raises(UserError, match=r"a\.csv:4: this row cannot be read as csv \(unexpected end of data\)"):
        list(read_text_records(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_bytes(gzip.compress(b"user_id,history\n" + b"w,[3]\n" * 50 + b"x,\xff\n" + b"w,[3]\n" * 50))
    with pytest.raises(UserError, match=r"a\.csv:52: this line is not UTF-8 text"):
        list(read_text_records(tmp_path / "a.csv"))


def test_lines_of_a_run_end_at_line_feeds_only(tmp_path: Path) -> None:
    rows = [{"event": "note", "text": ODD}, {"event": "step", "step": 1, "loss": 2.0, "text": ODD}]
    write(tmp_path / "metrics.jsonl", rows)
    assert read_rows(tmp_path / "metrics.jsonl") == rows
    lines, position = lines_after(tmp_path / "metrics.jsonl", 0)
    assert ([json.loads(line) for line in lines], position) == (rows, (tmp_path / "metrics.jsonl").stat().st_size)
    summary = read_run(tmp_path)
    assert (summary.unreadable_lines, summary.steps["loss"].tolist()) == (0, [2.0])
