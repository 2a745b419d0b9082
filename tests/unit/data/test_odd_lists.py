"""Files of histories, candidates and questions: lists as people write them, packed files, and other names of the user's column."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec_dist.data.sources.history_rows import BEAR, MINIONEREC, OWN, read_history_rows
from rec_dist.data.sources.interactions import BadRows
from rec_dist.data.sources.listings import read_listings
from rec_dist.errors import UserError


def listings(path: Path) -> list[tuple[str, list[str]]]:
    return [(row.user, row.names) for row in read_listings(path, "history", "--histories")]


@pytest.mark.parametrize("cell", ['["01", "It\'s, here"]', " ['01', \"It's, here\"]", "01|It's, here"])
@pytest.mark.parametrize("user", ["user_id", "userId", "customer_id"])
def test_a_cell_holds_a_list_as_json_or_python_writes_it(cell: str, user: str, tmp_path: Path) -> None:
    quoted = cell.replace('"', '""')
    (tmp_path / "h.csv").write_text(f'{user},history\nu,"{quoted}"\n')
    assert listings(tmp_path / "h.csv") == [("u", ["01", "It's, here"])]
    for kind in (pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({user: ["u"], "history": pa.array([cell]).cast(kind)}), tmp_path / "h.parquet")
        assert listings(tmp_path / "h.parquet") == [("u", ["01", "It's, here"])]


@pytest.mark.parametrize("cell", ["['a' 'b']", "['a', 'b'", "[a, b]"])
def test_a_cell_that_begins_like_a_list_and_is_none_is_told(cell: str, tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text(f'user_id,history\nu,"{cell}"\n')
    with pytest.raises(UserError, match=r"h\.csv:2: history"):
        listings(tmp_path / "h.csv")


@pytest.mark.parametrize("name", ["h.jsonl.gz", "h.jsonl.zst", "h.jsonl"])
def test_packed_histories_are_read_whatever_they_are_called(name: str, tmp_path: Path) -> None:
    line = json.dumps({"user_id": "u", "history": ["1"]}).encode()
    packed = pa.compress(line, codec="zstd", asbytes=True) if name.endswith(".zst") else gzip.compress(line)
    (tmp_path / name).write_bytes(packed)
    assert listings(tmp_path / name) == [("u", ["1"])]


def questions(path: Path) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
    bad = BadRows()
    rows = read_history_rows(path, bad, [OWN, MINIONEREC, BEAR])
    return [(row.user, row.history, row.target, row.candidates) for row in rows], bad.counts


def test_questions_take_python_literals_and_other_names_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(
        "userId,history,target,candidates\nu,\"['a', 'b']\",c,\"['c', 'd']\"\nv,['a' 'b'],c,\"['c']\"\n"
    )
    rows, bad = questions(tmp_path / "q.csv")
    assert rows == [("u", ["a", "b"], "c", ["c", "d"])]
    (reason,) = bad
    assert "history: \"['a' 'b']\" looks like a list and is neither JSON nor a Python literal" in reason
    pq.write_table(pa.table({"userId": ["u"], "history": [["a"]], "target": ["b"]}), tmp_path / "q.parquet")
    assert questions(tmp_path / "q.parquet")[0] == [("u", ["a"], "b", None)]


NO_TEXT = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())  # bytes that are not UTF-8, in a column of text


@pytest.mark.parametrize(
    ("names", "target", "words"),
    [
        (["user_id", "history", "target"], NO_TEXT, "cannot be read as Parquet .*utf-8"),
        (["user_id", "history", "history"], pa.array(["b"]), "two columns are named 'history'"),
        (["userId", "history", "user"], pa.array(["b"]), "userId, user may each be the user; name one of them user_id"),
    ],
)
def test_a_parquet_file_of_questions_that_cannot_be_read_is_told(
    names: list[str], target: pa.Array, words: str, tmp_path: Path
) -> None:
    table = pa.Table.from_arrays([pa.array(["u"]), pa.array([["a"]]), target], names=names)
    if "target" not in names:
        table = table.append_column("target", pa.array(["c"]))
    pq.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(UserError, match=words):
        questions(tmp_path / "q.parquet")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    mark, line = b"\xef\xbb\xbf", json.dumps({"user_id": "u", "history": ["1"], "target": "2"}).encode()
    (tmp_path / "h.jsonl").write_bytes(mark + line)
    assert listings(tmp_path / "h.jsonl") == [("u", ["1"])]
    assert questions(tmp_path / "h.jsonl") == ([("u", ["1"], "2", None)], {})
    (tmp_path / "h.csv").write_bytes(mark + b"user_id,history\nu,1\n")
    assert listings(tmp_path / "h.csv") == [("u", ["1"])]


def test_quotes_of_questions_that_are_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('user_id,history,target\nu,"["a"]",b\n')
    with pytest.raises(UserError, match=r"q\.csv:2: .* cannot be read as csv .*; put each cell with a quote in it in quotes"):
        questions(tmp_path / "q.csv")
