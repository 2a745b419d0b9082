"""What files of real people hold: no row, order, id or character is lost or changed without a line that says so."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prepare.blockwise.driver import Sizes
from rec_dist.data.prepare.prepare import prepare
from rec_dist.data.sources import find_files, read_interactions, write_tables
from rec_dist.data.sources.interactions import Interactions
from rec_dist.data.sources.quotes import _quoted_cells
from rec_dist.errors import UserError

SMALL = Sizes(block_bytes=120, partition_rows=9, range_rows=15, num_bins=16)


def read(source: Path, columns: dict[str, str] | None = None, bad: int = 0, format_name: str = "auto") -> Interactions:
    return read_interactions(find_files(source, format_name), columns or {}, bad)


def prepared(source: Path, **changes: Any) -> PreparedData:
    """The data set of a source, which is the same in memory and through files."""
    folder = source.parent / "out"
    for place in ("memory", "disk"):
        settings = {"split": "leave_one_out", "min_user_interactions": 1, "prepare_on": place, **changes}
        prepare(DataConfig(source=str(source), path=str(folder / place), **settings), sizes=SMALL)
    for path in (folder / "memory").iterdir():
        assert path.read_bytes() == (folder / "disk" / path.name).read_bytes(), path.name
    return PreparedData.open(folder / "memory")


def histories(data: PreparedData) -> dict[str, list[str]]:
    """The titles that each user chose, in their order: the test rows of leave_one_out hold all of them."""
    split = data.split("test")
    return {split.shards.raw_user(row): [data.titles[i] for i in split.items_of(row)] for row in range(len(split))}


def write(path: Path, *rows: str) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


# Quotes


def log(separator: str, odd: dict[int, str]) -> list[str]:
    """A header and 24 rows of 3 users; odd: other titles, by row."""
    rows = [f"u{n % 3},i{n % 8},{n},{odd.get(n, f'Title {n % 8}')}".replace(",", separator, 3) for n in range(24)]
    return ["user,item,timestamp,title".replace(",", separator), *rows]


def test_quotes_of_a_tsv_that_are_none_swallow_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", *log("\t", {2: '"Weird Olaf" Silent', 5: '"Heroes', 7: 'Say "Hello'}))
    got = read(path)
    assert len(got) == 24
    assert {'"Heroes', 'Say "Hello', '"Weird Olaf" Silent'} <= set(got.items.titles)
    assert "a.tsv:4: 2 quotes are not as RFC 4180 has them (also in line 7)" in got.notes[0]
    assert len(prepared(path).raw_items) == 8


def test_quotes_of_a_csv_that_are_none_make_bad_rows_and_no_others(tmp_path: Path) -> None:
    odd = {3: '"a ""fine"" title, here"', 5: '"Heroes', 14: 'Say "Hello', 20: '"Olaf" Silent'}
    path = write(tmp_path / "a.csv", *log(",", odd))
    with pytest.raises(UserError, match=r"a\.csv:7: a quoted cell does not end with its quote \('u2,i5,5,\"Heroes'\), 2 of this"):
        read(path)
    got = read(path, bad=2)
    assert len(got) == 22
    assert 'a "fine" title, here' in got.items.titles
    assert "a.csv:7: 2 quotes are not as RFC 4180 has them (also in line 22): each line is a row" in got.notes[0]
    prepared(path, max_bad_rows=2)


def test_line_ends_inside_quotes_are_counted(tmp_path: Path) -> None:
    got = read(write(tmp_path / "a.csv", *log(",", {3: '"two\nlines"', 9: '"t\nh\nree"'})))
    assert len(got) == 24
    assert "a.csv:5: 3 line ends stand inside quoted cells" in got.notes[0]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_quote_that_is_never_closed_swallows_nothing(separator: str, tmp_path: Path) -> None:
    got = read(write(tmp_path / "a.tsv", *log(separator, {20: '"Heroes'})), bad=1)
    assert len(got) == (24 if separator == "\t" else 23)


def test_quoted_cells_are_found_as_a_reader_of_characters_finds_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(4000):
        text = "".join(rng.choice(list('"",\n a'), size=int(rng.integers(14))))
        got = _quoted_cells(text.encode(), ",")
        assert (got.starts.tolist(), got.stops.tolist(), got.faulty, got.open) == by_character(text), repr(text)


def by_character(text: str) -> tuple[list[int], list[int], list[int], int | None]:
    starts: list[int] = []
    stops: list[int] = []
    faulty: list[int] = []
    place, inside = 0, False
    while place < len(text):
        quote = text[place] == '"'
        if inside and quote and text[place + 1 : place + 2] == '"':
            place += 1
        elif inside and quote:
            inside = False
            stops.append(place)
            behind = text[place + 1 :].lstrip(" ")[:1]
            if behind and behind not in ",\n":
                faulty.append(starts[-1])
        elif quote and (place == 0 or text[place - 1] in ",\n"):
            inside = True
            starts.append(place)
        place += 1
    return (starts[:-1], stops, faulty, starts[-1]) if inside else (starts, stops, faulty, None)


# Timestamps


def in_time(order: list[int]) -> list[str]:
    """The titles of 16 items in the order of their times, which are a shuffle of 0 to 15."""
    return [f"T{item}" for item in np.argsort(order)]


ORDER = np.random.default_rng(3).permutation(16).tolist()
DAY = datetime.datetime(2024, 2, 28, 23, 59, 58, tzinfo=datetime.UTC)
CLOCKS = [DAY + datetime.timedelta(milliseconds=250 * rank) for rank in ORDER]


@pytest.mark.parametrize(
    "times",
    [
        [f"{1600000000 + 0.001 * rank:.3f}" for rank in ORDER],
        [repr(rank / 17) for rank in ORDER],
        [f"{rank - 8}.5" for rank in ORDER],
        [f"1600000000.{rank:09d}" for rank in ORDER],
        [f"1.{rank:02d}e9" for rank in ORDER],
        [clock.isoformat() for clock in CLOCKS],
        [clock.strftime("%Y-%m-%d %H:%M:%S.%f") for clock in CLOCKS],
        [clock.strftime("%Y-%m-%dT%H:%M:%S.%fZ") for clock in CLOCKS],
        [clock.astimezone(datetime.timezone(datetime.timedelta(hours=n - 9))).isoformat() for n, clock in enumerate(CLOCKS)],
        [f"2024-01-{rank + 1:02d}" for rank in ORDER],
    ],
    ids=["ms", "unit", "negative", "ns", "exponent", "zone", "no zone", "Z", "zones", "days"],
)
@pytest.mark.parametrize("kind", ["csv", "inter"])
def test_text_timestamps_keep_their_order(times: list[str], kind: str, tmp_path: Path) -> None:
    separator = "\t" if kind == "inter" else ","
    rows = [separator.join(("u", f"T{item}", time)) for item, time in enumerate(times)]
    path = write(tmp_path / f"a.{kind}", separator.join(("user_id", "item_id", "timestamp")), *rows)
    assert histories(prepared(path)) == {"u": in_time(ORDER)}


RANKS = pa.array(ORDER, pa.int64())


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1600000000 + 0.001 * rank for rank in ORDER]),
        pa.array([rank / 17 for rank in ORDER]),
        pa.array([float(rank - 8) / 4 for rank in ORDER], pa.float32()),
        RANKS.cast(pa.timestamp("ns")),
        RANKS.cast(pa.timestamp("us", "Europe/Berlin")),
        RANKS.cast(pa.int32()).cast(pa.date32()),
        pa.array([f"{rank}.25" for rank in ORDER]).cast(pa.decimal128(12, 4)),
        pa.array([clock.isoformat() for clock in CLOCKS]),
        pa.array([clock.isoformat() for clock in CLOCKS]).dictionary_encode(),
        RANKS.cast(pa.duration("ms")),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_typed_timestamps_keep_their_order(column: pa.Array, tmp_path: Path) -> None:
    table = pa.table({"user": ["u"] * 16, "item": [f"T{item}" for item in range(16)], "timestamp": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    assert histories(prepared(tmp_path / "a.parquet")) == {"u": in_time(ORDER)}


def test_fractions_are_told_and_a_cut_in_time_falls_between_them(tmp_path: Path) -> None:
    rows = [f"u{n % 4},i{n},{1600000000 + n / 1000}" for n in range(40)]
    data = prepared(write(tmp_path / "a.csv", "user,item,timestamp", *rows), split="global_temporal", valid_fraction=0.2)
    assert any("39 timestamps have a fraction: all are stored in units of 1e-9" in note for note in data.manifest.notes)
    assert data.manifest.tie_share == 0.0
    assert data.manifest.cuts["valid_from"] == 1600000000028000000


def test_dates_are_known_behind_line_ends_of_unicode(tmp_path: Path) -> None:
    rows = [f"u,A\u2028{n}\x85,i{n},2024-01-0{n}" for n in (1, 2)]
    got = read(write(tmp_path / "a.csv", "user,title,item,timestamp", *rows))
    assert got.timestamp is not None and np.diff(got.timestamp).tolist() == [86400]


def test_a_date_with_two_meanings_is_told_and_how_to_write_it(tmp_path: Path) -> None:
    """Of 01/02/2024 nothing says whether it is in January; a day above 12 would not settle it for the other rows."""
    says = "order of day and month is ambiguous; write the year first, as 2024-02-01"
    for cells in (["01/02/2024", "31/12/2024 10:00"], ["2024-01-01", "1.2.2024"], ["1704067200", "01-02-2024"]):
        path = write(tmp_path / "a.csv", "user,item,timestamp", *(f"a,i{n},{cell}" for n, cell in enumerate(cells)))
        with pytest.raises(UserError, match=says):
            read(path)


def test_a_date_among_numbers_is_one_bad_row_and_so_is_a_day_that_is_none(tmp_path: Path) -> None:
    numbers = read(write(tmp_path / "a.csv", "user,item,timestamp", "a,x,1.5", "a,y,2024-01-01", "a,z,2"), bad=1)
    assert numbers.bad_rows == {"timestamp is not a number": 1}
    dates = write(
        tmp_path / "b.csv",
        "user,item,timestamp",
        "a,x,2024-02-29",
        "a,y,2023-02-29",
        "a,z,1700000000",
        "a,w,2024-13-01",
        "a,v,2024-02-29 01:00+25:00",
    )
    assert read(dates, bad=4).bad_rows == {"timestamp is not a date (ISO 8601), as in other rows": 4}


# Ids


def test_ids_are_text_as_their_type_writes_them(tmp_path: Path) -> None:
    names = [uuid.UUID(int=n * 0x1234567890ABCDEF << 60 | 0xFF) for n in range(4)]
    table = pa.table(
        {
            "user": pa.array([name.bytes for name in names], pa.uuid()),
            "item": pa.array([1_000_000_000_000_025.0, 7.0, 0.5, 2.0**53]),
            "timestamp": range(4),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    got = read(tmp_path / "a.parquet")
    assert got.raw_users == [str(name) for name in names]
    assert got.items.raw == ["1000000000000025", "7", "0.5", "9007199254740992"]


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.float16()])
def test_a_missing_number_is_no_id(kind: pa.DataType, tmp_path: Path) -> None:
    values = pa.array(np.array([1, np.nan, 2], dtype=kind.to_pandas_dtype()))
    pq.write_table(pa.table({"user": values, "item": ["x", "y", "z"], "timestamp": [1, 2, 3]}), tmp_path / "a.parquet")
    got = read(tmp_path / "a.parquet", bad=1)
    assert got.raw_users == ["1", "2"]
    assert got.bad_rows == {"empty user": 1}


def test_leading_zeros_stay(tmp_path: Path) -> None:
    got = read(write(tmp_path / "a.csv", "user,item", "007,01", "7,1"))
    assert (got.raw_users, got.items.raw) == (["007", "7"], ["01", "1"])


@pytest.mark.parametrize("role", ["user", "item", "title", "timestamp", "rating", "year"])
def test_a_list_in_another_role_than_categories_is_told(role: str, tmp_path: Path) -> None:
    columns = {"user": ["a"], "item": ["x"], "timestamp": [1], role: [["p", "q"]]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"the column {role} is of type list.*cannot be a {role}"):
        read(tmp_path / "a.parquet")


def test_a_null_in_a_list_takes_nothing_with_it(tmp_path: Path) -> None:
    columns = {"user": ["a", "a"], "item": ["x", "y"], "categories": [["Rock | Pop", None, "Jazz"], None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").items.categories == [["Rock | Pop", "Jazz"], []]


# Titles

FORMS = [
    "Caf\u00e9 Noir",
    "Cafe\u0301 Noir",
    "Caf\u00e9\u200b Noir",
    "Caf&eacute; Noir",
    "\ufeffCaf\u00e9  Noir",
    "Caf&#233;&nbsp;Noir",
]


@pytest.mark.parametrize("kind", ["csv", "parquet", "recbole", "amazon"])
def test_titles_of_one_reading_are_one_item_in_every_format(kind: str, tmp_path: Path) -> None:
    items = [f"i{n}" for n in range(len(FORMS))]
    if kind == "csv":
        source = write(tmp_path / "a.csv", "user,item,title", *(f"u,{i},{form}" for i, form in zip(items, FORMS, strict=True)))
    elif kind == "parquet":
        source = tmp_path / "a.parquet"
        pq.write_table(pa.table({"user": ["u"] * len(FORMS), "item": items, "title": FORMS}), source)
    elif kind == "recbole":
        source = write(tmp_path / "a.inter", "user_id:token\titem_id:token", *(f"u\t{item}" for item in items))
        write(tmp_path / "a.item", "item_id:token\ttitle:token_seq", *map("\t".join, zip(items, FORMS, strict=True)))
    else:
        reviews = [{"user_id": "u", "parent_asin": item, "rating": 1.0, "timestamp": 1} for item in items]
        source = write(tmp_path / "a.jsonl", *map(json.dumps, reviews))
        meta = [{"parent_asin": item, "title": form} for item, form in zip(items, FORMS, strict=True)]
        write(tmp_path / "meta_a.jsonl", *map(json.dumps, meta))
    got = read(source)
    assert {" ".join(title.split()) for title in got.items.titles} == {"Caf\u00e9 Noir"}
    for words in ("2 titles hold HTML entities", "2 titles hold zero-width characters", "1 titles are not in Unicode's form NFC"):
        assert any(words in note for note in got.notes), (words, got.notes)
    with pytest.raises(UserError, match=r"leaves the (train|valid|test) split without a target"):
        prepared(source)  # six titles were one item, so no user has two


def test_titles_may_be_kept_as_they_are(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "user,item,title", "u,a,A &amp; B", "u,b,Cafe\u0301", "u,c,Z", "u,d,Y")
    assert set(prepared(source, clean_text=False).titles) == {"A &amp; B", "Cafe\u0301", "Z", "Y"}


def test_only_whole_entities_are_decoded(tmp_path: Path) -> None:
    titles = ["AT&T", "R&D; more", "a?b=1&copy=2", "Q&amp;A", "&unknown;"]
    got = read(write(tmp_path / "a.csv", "user,item,title", *(f"u,{n},{title}" for n, title in enumerate(titles))))
    assert got.items.titles == ["AT&T", "R&D; more", "a?b=1&copy=2", "Q&A", "&unknown;"]


# Items without a title


def test_the_first_title_that_is_not_empty_counts(tmp_path: Path) -> None:
    rows = ["u,a,", "u,b,B", "v,a,&nbsp;", "v,b,", "v,a,A", "v,c,C", "u,c,C"]
    got = read(write(tmp_path / "a.csv", "user,item,title", *rows))
    assert dict(zip(got.items.raw, got.items.titles, strict=True)) == {"a": "A", "b": "B", "c": "C"}
    assert got.bad_rows == {}
    assert not any("further titles" in note for note in got.notes)


@pytest.mark.parametrize("times", [True, False])
def test_items_without_a_title_are_bad_rows_all_at_once(times: bool, tmp_path: Path) -> None:
    rows = [f"u{n % 5},i{n % 7}{f',{n}' if times else ''},{'' if n % 7 in (2, 4) else f'T{n % 7}'}" for n in range(70)]
    source = write(tmp_path / "a.csv", f"user,item{',timestamp' if times else ''},title", *rows)
    with pytest.raises(UserError, match=r"20 rows cannot be read. .*a\.csv:4: item has no title \('i2'\), 20 of this kind"):
        read(source)
    data = prepared(source, max_bad_rows=20)
    assert data.manifest.counts["raw_rows"] == 50
    assert sorted(data.titles) == ["T0", "T1", "T3", "T5", "T6"]
    assert any("2 items have no title in any of their rows" in note for note in data.manifest.notes)
    assert data.manifest.bad_rows == {"item has no title": 20}


def test_a_user_whose_every_row_has_no_title_takes_no_place(tmp_path: Path) -> None:
    rows = ["ghost,x,", "u,a,A", "v,b,B", "u,b,B", "v,a,A", "ghost,x,", "u,c,C", "v,c,C", "v,d,D", "u,d,D"]
    data = prepared(write(tmp_path / "a.csv", "user,item,title", *rows), max_bad_rows=2)
    assert histories(data) == {"u": list("ABCD"), "v": list("BACD")}


def test_an_items_file_without_titles_says_so_and_not_that_items_are_missing(tmp_path: Path) -> None:
    rows = [f"u{n % 3}\ti{n % 5}" for n in range(30)]
    write(tmp_path / "a.inter", "user_id:token\titem_id:token", *rows)
    write(tmp_path / "a.item", "item_id:token\ttitle:token_seq", *(f"i{n}\t{'' if n in (1, 2) else n}" for n in range(5)))
    with pytest.raises(UserError, match=r"12 rows cannot be read. .*a.inter:3: item has no title in a.item \('i1'\), 12 of this"):
        read(tmp_path)
    got = read(tmp_path, bad=12)
    assert len(got) == 18
    assert "a.item: 2 items have no title" in got.notes[0]


# Packed files

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", ["", ".{}"])
@pytest.mark.parametrize("kind", sorted(PACKERS))
def test_packed_files_are_read_whatever_they_are_called(kind: str, suffix: str, tmp_path: Path) -> None:
    text = "\n".join(log(",", {3: '"two\nlines"'})).encode()
    path = tmp_path / f"a.csv{suffix.format(kind)}"
    path.write_bytes(PACKERS[kind](text))
    assert len(read(path)) == 24
    prepared(path)
    path.write_bytes(PACKERS[kind](text * 9)[:-9])
    with pytest.raises(UserError, match=r"cannot be decompressed \("):
        read(path)


def zipped(name: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(name, "user,item\na,b\n")
    return target.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.zip", zipped("a.csv"), "is a zip archive, not text; unpack it"),
        ("a.csv", zipped("a.csv"), "is a zip archive, not text; unpack it"),
        ("a.xlsx", zipped("[Content_Types].xml"), "is an Excel workbook, not text; save its sheet as csv"),
        ("a.csv", b"PAR1" + bytes(40), "is a Parquet file, not text; give it the suffix .parquet"),
        ("a.csv", "user,item\na,b\n".encode("utf-16"), "the first line is UTF-16; save the file as UTF-8"),
        ("a.inter", b"user_id:token item_id:token\na b\n", "the columns are separated by blanks, not by tabs"),
        ("a.inter", b"user_id:token,item_id:token\na,b\n", "the columns are separated by commas, not by tabs"),
        ("a.csv", b"user item timestamp\na b 1\n", "the columns are separated by blanks, not by commas"),
    ],
)
def test_the_message_names_the_cause(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert words in str(caught.value)


# Amazon


def reviews(folder: Path, name: str = "Toys_5.json", **changes: Any) -> Path:
    rows = [{"reviewerID": f"u{n % 3}", "asin": f"i{n % 4}", "overall": 5.0, "unixReviewTime": n, **changes} for n in range(12)]
    return write(folder / name, *map(json.dumps, rows))


def test_the_only_metadata_of_a_folder_is_used_and_several_are_refused(tmp_path: Path) -> None:
    reviews(tmp_path, "reviews_Toys_5.json")
    write(tmp_path / "meta_Toys.json", *(json.dumps({"asin": f"i{n}", "title": f"T{n}"}) for n in range(4)))
    got = read(tmp_path)
    assert got.items.titles == ["T0", "T1", "T2", "T3"]
    assert "meta_Toys.json, the only meta_ file beside reviews_Toys_5.json" in got.notes[0]
    write(tmp_path / "meta_Games.json", "{}")
    with pytest.raises(UserError, match=r"2 files of metadata \(meta_Games.json, meta_Toys.json\)"):
        read(tmp_path)


def test_metadata_that_is_no_json_is_told(tmp_path: Path) -> None:
    reviews(tmp_path)
    write(tmp_path / "meta_Toys.json", *(str({"asin": f"i{n}", "title": f"T{n}"}) for n in range(4)))
    with pytest.raises(
        UserError, match=r"no line of .*meta_Toys.json can be read: .*:1: not a JSON .*Python dict.*4 of this kind"
    ):
        read(tmp_path)


def test_pieces_of_pages_are_no_titles_and_products_are_not_called_missing(tmp_path: Path) -> None:
    reviews(tmp_path)
    titles = ['<span id="productTitle" class="a">Ball</span>', "\n var aPageStart = (new Date()).getTime();", "Cup", ""]
    write(tmp_path / "meta_Toys.json", *(json.dumps({"asin": f"i{n}", "title": title}) for n, title in enumerate(titles)))
    got = read(tmp_path, bad=9)
    assert got.bad_rows == {"item has no title in meta_Toys.json": 9}
    assert set(got.item.tolist()) == {2}
    assert "3 products without a title" in got.notes[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"unixReviewTime": "1600000000"}, "unixReviewTime is text, not a number"),
        ({"overall": [5]}, "overall is a list, not a number"),
        ({"asin": {"a": 1}}, "asin is an object, not a text"),
        ({"reviewerID": True}, "reviewerID is true or false, not a text"),
    ],
)
def test_the_reason_of_a_bad_review_is_its_field(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = reviews(tmp_path)
    with path.open("a") as file:
        file.write(json.dumps({"reviewerID": "u", "asin": "i0", "overall": 1.0, "unixReviewTime": 1, **change}) + "\n")
    assert read(tmp_path, bad=1).bad_rows == {reason: 1}


# Names


@pytest.mark.parametrize(
    "header",
    [
        "user_id,item_id,timestamp,title",
        "userId,movieId,time,name",
        "customer_id,product_id,created_at,item_name",
        "visitorid,parent_asin,date,title",
        "session_id,asin,unixReviewTime,name",
        "User-ID,ISBN,Timestamp,Title",
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_common_headers_need_no_key(header: str, kind: str, tmp_path: Path) -> None:
    rows = [["a", "x", 2, "X"], ["a", "y", 1, "Y"]]
    names = header.split(",")
    if kind == "csv":
        source = write(tmp_path / "a.csv", header, *(",".join(map(str, row)) for row in rows))
    else:
        source = tmp_path / "a.parquet"
        pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), source)
    got = read(source)
    assert (got.raw_users, got.items.raw, got.items.titles) == (["a"], ["x", "y"], ["X", "Y"])
    assert got.timestamp is not None
    assert got.timestamp.tolist() == [2, 1]
    assert f"columns are taken as user={names[0]}, item={names[1]}, timestamp={names[2]}, title={names[3]}" in got.notes[0]


def test_tables_in_memory_are_read_as_files_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import pandas as pd

    times = [clock.isoformat() for clock in CLOCKS[:4]]
    events = pd.DataFrame({"user_id": [1.0, np.nan, 1.0, 2.0], "movieId": [1e15, 7, 7, 1e15], "time": times})
    films = pd.DataFrame({"movieId": [7, 10**15], "name": ["Caf&eacute;", "B"], "genres": [["x", None], []]})
    with caplog.at_level("INFO", logger="rec_dist"):
        found = write_tables(events, films, {}, tmp_path)
    got = read_interactions(found, {}, 1)
    assert got.raw_users == ["1", "2"]
    assert dict(zip(got.items.raw, got.items.titles, strict=True)) == {"1000000000000000": "B", "7": "Caf\u00e9"}
    assert got.items.categories == [[], ["x"]]
    assert got.bad_rows == {"empty user": 1}
    assert "columns are taken as user=user_id, item=movieId, timestamp=time" in caplog.text
    with pytest.raises(UserError, match=r"set data\.columns\.user=user_id or data\.columns\.user=user\."):
        write_tables(events.assign(user="x"), films, {}, tmp_path)


def test_a_table_of_items_may_lack_titles_and_no_ids(tmp_path: Path) -> None:
    events = pa.table({"user": ["u", "u", "v"], "item": [1, 2, 2]})
    found = write_tables(events, pa.table({"item": [1, 2], "title": ["A", None]}), {}, tmp_path)
    assert read_interactions(found, {}, 2).bad_rows == {"item has no title": 2}
    for ids, count in (([1.0, 2.0, None], 1), ([1.0, 2.0, float("nan"), None], 2)):
        with pytest.raises(UserError, match=f"items: column item is empty in {count} of {len(ids)} rows"):
            write_tables(events, pa.table({"item": ids, "title": ["A"] * len(ids)}), {}, tmp_path)


def test_two_columns_that_fit_are_an_error_that_names_both_keys(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "user_id,asin,parent_asin", "u,a,b")
    with pytest.raises(UserError, match=r"set data\.columns\.item=asin or data\.columns\.item=parent_asin"):
        read(source)
    assert read(source, {"item": "asin"}).items.raw == ["a"]
