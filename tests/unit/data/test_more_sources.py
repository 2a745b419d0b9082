"""Amazon Reviews, Parquet and compressed files give the same rows as plain text, and faults name file and line."""

import datetime
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec_dist.config.schema import DataConfig
from rec_dist.data.prepare.blockwise.driver import Sizes
from rec_dist.data.prepare.prepare import prepare
from rec_dist.data.sources import find_files, open_source, read_interactions
from rec_dist.data.sources.interactions import Interactions
from rec_dist.errors import UserError

REVIEWS = [("A1", "B01", 4.0, 1400000000), ("A2", "B02", 2.0, 1300000000), ("A1", "B02", 5.0, 1400000001)]
FIELDS = {
    2018: ("reviewerID", "asin", "overall", "unixReviewTime", "category"),
    2023: ("user_id", "parent_asin", "rating", "timestamp", "categories"),
}


def read(source: Path, columns: dict[str, str] | None = None, bad: int = 0, format_name: str = "auto") -> Interactions:
    return read_interactions(find_files(source, format_name), columns or {}, bad)


def review(edition: int, row: tuple[str, str, float, int]) -> str:
    user, item, rating, when, _ = FIELDS[edition]
    fields = {rating: row[2], "title": "Great!\u2028", user: row[0], item: row[1], when: row[3], "images": [{"a": 1}]}
    # Fields that change their type from line to line, as `style` does in 2018, must not matter.
    return json.dumps({**fields, "style": {"Size:": row[0]} if row[0] == "A1" else "none"})


def write_amazon(folder: Path, edition: int, suffix: str, name: str = "Toys") -> Path:
    _, item, _, _, categories = FIELDS[edition]
    meta = [
        {item: "B02", "title": "Cup &amp; Saucer", categories: ["Home", "Tea &amp; Coffee"], "price": None},
        {item: "B01", "title": " Ball ", categories: [], "details": {"x": 1}},
        {item: "B01", "title": "Ball again"},
        {item: "B03", "title": ""},
    ]
    opener = gzip.open if suffix.endswith(".gz") else open
    with opener(folder / f"{name}{suffix}", "wt", encoding="utf-8") as file:
        file.write("\n".join(review(edition, row) for row in REVIEWS))
    with opener(folder / f"meta_Toys{suffix}", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in meta)
    return folder / f"{name}{suffix}"


@pytest.mark.parametrize(("edition", "suffix"), [(2018, ".json"), (2018, ".json.gz"), (2023, ".jsonl"), (2023, ".jsonl.gz")])
@pytest.mark.parametrize("name", ["Toys", "Toys_5"])
def test_both_editions_of_amazon_read_the_same(edition, suffix, name, tmp_path):
    write_amazon(tmp_path, edition, suffix, name)
    found = find_files(tmp_path, "auto")
    assert (found.format, len(found.files)) == ("amazon", 2)
    got = read(tmp_path)
    assert [got.raw_users[u] for u in got.user] == ["A1", "A2", "A1"]
    assert [got.items.titles[i] for i in got.item] == ["Ball", "Cup & Saucer", "Cup & Saucer"]
    assert got.items.categories == [["Home", "Tea & Coffee"], [], []]
    assert got.items.titles[2] == "", "a product without a title is known, and its reviews are bad rows"
    np.testing.assert_array_equal(got.rating, [4, 2, 5])
    np.testing.assert_array_equal(got.timestamp, [row[3] for row in REVIEWS])
    assert "1 products without a title and 1 repeated ones" in got.notes[0]


def test_amazon_rows_that_cannot_be_used(tmp_path):
    path = write_amazon(tmp_path, 2023, ".jsonl")
    lines = ["", "not json", '["a", "list"]', review(2023, ("", "B01", 1.0, 1)), review(2023, ("A3", "B03", 1.0, 1))]
    lines += [
        review(2023, ("A3", "B01", 1.0, 1)).replace('"rating": 1.0', '"rating": "five"'),
        '{"user_id": "A3", "parent_asin": "B01"}',
    ]
    with path.open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        read(tmp_path, bad=5)
    message = str(caught.value)
    assert "6 rows cannot be read" in message
    assert f"{path}:5: not a JSON object of a review ('not json'), 2 of this kind" in message
    assert f"{path}:7: empty user_id" in message
    assert f"{path}:8: item has no title in meta_Toys.jsonl ('B03')" in message
    assert f"{path}:9: rating is text, not a number" in message
    assert f"{path}:10: rating is not a number" in message
    assert len(read(tmp_path, bad=6)) == 3


def test_a_json_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"x.jsonl:1: this is not a review of Amazon Reviews 2018 or 2023.* parent_asin"):
        read(tmp_path)


def test_reviews_without_metadata_use_raw_names(tmp_path):
    write_amazon(tmp_path, 2018, ".json")
    (tmp_path / "meta_Toys.json").unlink()
    got = read(tmp_path)
    assert got.items.titles == ["B01", "B02"]
    assert "meta_Toys.json does not exist" in got.notes[0]


def parquet_table() -> pa.Table:
    when = [datetime.datetime.fromtimestamp(row[3], datetime.UTC) for row in REVIEWS]
    return pa.table(
        {
            "who": pa.array([7, 8, 7], pa.int64()),
            "what": pa.array([row[1] for row in REVIEWS]).dictionary_encode(),
            "stars": pa.array([row[2] for row in REVIEWS], pa.float32()),
            "when": pa.array(when, pa.timestamp("ms", tz="UTC")),
            "title": ["Ball", "Cup", "Cup"],
            "categories": [["a", "b"], [], []],
            "unused": [b"\xff", b"", b""],
        }
    )


COLUMNS = {"user": "who", "item": "what", "rating": "stars", "timestamp": "when"}


def test_parquet_with_a_column_map(tmp_path):
    pq.write_table(parquet_table(), tmp_path / "log.parquet")
    got = read(tmp_path, COLUMNS)
    assert [got.raw_users[u] for u in got.user] == ["7", "8", "7"]
    assert [got.items.titles[i] for i in got.item] == ["Ball", "Cup", "Cup"]
    assert got.items.categories == [["a", "b"], []]
    np.testing.assert_array_equal(got.rating, [4, 2, 5])
    np.testing.assert_array_equal(got.timestamp, [row[3] * 1000 for row in REVIEWS])


def test_parquet_parts_are_one_source_and_nulls_are_bad_rows(tmp_path):
    table = parquet_table()
    pq.write_table(table, tmp_path / "part-0.parquet", row_group_size=1)
    holes = table.set_column(0, "who", pa.array([None, 9, 7], pa.int64()))
    pq.write_table(holes.set_column(2, "stars", pa.array([1, None, 3], pa.float32())), tmp_path / "part-1.parquet")
    with pytest.raises(UserError) as caught:
        read(tmp_path, COLUMNS)
    assert f"{tmp_path}/part-1.parquet:1: empty who ('')" in str(caught.value)
    assert f"{tmp_path}/part-1.parquet:2: rating is not a number ('')" in str(caught.value)
    got = read(tmp_path, COLUMNS, bad=2)
    assert [got.raw_users[u] for u in got.user] == ["7", "8", "7", "7"]
    pq.write_table(table.drop_columns(["stars"]), tmp_path / "part-2.parquet")
    with pytest.raises(UserError, match=r"part-2.parquet: the column stars is missing or of another type than in part-0"):
        read(tmp_path, COLUMNS, bad=2)
    with pytest.raises(UserError, match=r"data.columns.user \(nobody\) is not a column of .*part-0.parquet"):
        read(tmp_path, {"user": "nobody"})


def test_a_damaged_parquet_file_is_the_users_mistake(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"x.parquet is not a Parquet file"):
        read(tmp_path)


def test_a_packed_file_that_ends_early_is_named(tmp_path):
    data = gzip.compress(b"user,item\n" + b"a,x\n" * 100000)
    (tmp_path / "log.csv.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"log.csv.gz cannot be decompressed"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["amazon", "parquet"])
def test_blocks_of_other_formats_give_the_same_data_set(kind, tmp_path):
    rows = [(f"A{r % 13}", f"B{r % 7:02d}", 5.0, 1000 + r) for r in range(400)]
    source = tmp_path / "source"
    source.mkdir()
    if kind == "amazon":
        (source / "x.jsonl").write_text("\n".join(review(2023, row) for row in rows))
    else:
        names = ("user", "item", "rating", "timestamp")
        table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
        for part in range(2):
            pq.write_table(table.slice(part * 200, 200), source / f"{part}.parquet", row_group_size=30)
    opened = open_source(find_files(source, "auto"), {})
    assert sum(len(opened.rows.cut(file, 900)) for file in opened.files) > 4
    for place in ("memory", "disk"):
        config = DataConfig(source=str(source), path=str(tmp_path / place), split="leave_one_out", prepare_on=place)
        prepare(config, sizes=Sizes(900, 50, 70, 16))
    for path in (tmp_path / "memory").iterdir():
        assert path.read_bytes() == (tmp_path / "disk" / path.name).read_bytes(), path.name


BOOKS = [
    '"ISBN";"Book-Title";"Book-Author"',
    '"01";"The Word \\"Desire\\"";"Rikki Ducornet"',
    '"02";"Dr. Jekyll &amp; Mr. Hyde; and others";"R. L. Stevenson"',
    '"\\"03";"Café";"X"',
]
BOOK_RATINGS = [
    '"User-ID";"ISBN";"Book-Rating"',
    '"7";"02";"8"',
    '"7";"01";"0"',  # the user has the book but did not rate it
    '"8";"\\"03";"3"',
    '"7";"99";"0"',  # an unknown book that is not rated is no fault
    '"9";"01";"10"',
]


def write_books(folder: Path, *more: str) -> None:
    (folder / "BX-Books.csv").write_bytes("\r\n".join([*BOOKS, ""]).encode("latin-1"))
    (folder / "BX-Book-Ratings.csv").write_bytes("\r\n".join([*BOOK_RATINGS, *more, ""]).encode("latin-1"))


def test_book_crossing_keeps_the_explicit_ratings(tmp_path: Path) -> None:
    write_books(tmp_path)
    got = read(tmp_path)
    assert got.items.titles == ['The Word "Desire"', "Dr. Jekyll & Mr. Hyde; and others", "Café"]
    rows = [(got.raw_users[u], got.items.raw[i], r) for u, i, r in zip(got.user, got.item, got.rating, strict=True)]
    assert rows == [("7", "02", 8.0), ("8", '"03', 3.0), ("9", "01", 10.0)]
    assert got.timestamp is None


def test_a_rating_of_an_unknown_book_is_a_bad_row(tmp_path: Path) -> None:
    write_books(tmp_path, '"9";"98";"5"')
    with pytest.raises(UserError, match=r"BX-Book-Ratings\.csv:7: .*item is not in BX-Books\.csv"):
        read(tmp_path)
    assert len(read(tmp_path, bad=1).user) == 3


def test_blocks_of_book_crossing_give_the_same_rows(tmp_path: Path) -> None:
    write_books(tmp_path, *(f'"{user}";"{["01", "02"][user % 2]}";"{user % 11}"' for user in range(10, 200)))
    source = open_source(find_files(tmp_path, "book_crossing"), {})
    blocks = source.rows.cut(source.files[0], 100)
    assert len(blocks) > 20
    read_of = lambda some: [
        (users[u], i, r)
        for rows in (source.rows.read(block, source.known) for block in some)
        for users in [rows.users.to_pylist()]
        for u, i, r in zip(rows.user, rows.item, rows.rating, strict=True)
    ]
    assert read_of(blocks) == read_of(source.files)
