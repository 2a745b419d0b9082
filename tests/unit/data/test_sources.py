"""Sources: all layouts give the same interactions, and messages name file and line of an unreadable row."""

from pathlib import Path

import numpy as np
import pytest

from rec_dist.data.prepare.titles import make_distinct
from rec_dist.data.sources import find_files, read_interactions
from rec_dist.data.sources.interactions import Interactions, ItemTable
from rec_dist.data.sources.titles import restore_article, split_year
from rec_dist.errors import UserError

MOVIES = [
    ("10", "Matrix, The", 1999, ["Action", "Sci-Fi"]),
    ("20", "Misérables, Les", 1995, ["Drama", "Musical"]),
    ("30", "Heat", 1995, []),
]
RATINGS = [("u1", "10", "4", "100"), ("u2", "20", "3", "90"), ("u1", "30", "5", "100")]
WANTED_TITLES = ["The Matrix", "Les Misérables", "Heat"]


def read(source: Path, columns: dict[str, str] | None = None, bad: int = 0, format_name: str = "auto") -> Interactions:
    return read_interactions(find_files(source, format_name), columns or {}, bad)


def write_recbole(folder: Path) -> None:
    rows = ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *("\t".join(row) for row in RATINGS)]
    (folder / "tiny.inter").write_bytes("\r\n".join([*rows, ""]).encode())
    items = [f"{i}\t{t}\t{y}\t{' '.join(g)}" for i, t, y, g in MOVIES]
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    (folder / "tiny.item").write_bytes("\r\n".join([header, *items, ""]).encode())


def write_100k(folder: Path) -> None:
    genres = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"]
    genres += ["Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]
    lines = [
        "|".join([i, f"{t} ({y})", "01-Jan-1999", "", "http://x/?a=b", *("1" if g in has else "0" for g in genres)])
        for i, t, y, has in MOVIES
    ]
    (folder / "u.item").write_bytes("\n".join([*lines, ""]).encode("latin-1"))
    (folder / "u.data").write_text("\n".join("\t".join(row) for row in RATINGS))


def write_1m(folder: Path) -> None:
    lines = [f"{i}::{t} ({y})::{'|'.join(g) or '(no genres listed)'}" for i, t, y, g in MOVIES]
    (folder / "movies.dat").write_bytes("\n".join(lines).encode("latin-1"))
    (folder / "ratings.dat").write_text("\n".join("::".join(row) for row in RATINGS))


def write_25m(folder: Path) -> None:
    lines = [f'{i},"{t} ({y})",{"|".join(g) or "(no genres listed)"}' for i, t, y, g in MOVIES]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *lines]), encoding="utf-8-sig")
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *(",".join(row) for row in RATINGS)]))


@pytest.mark.parametrize("write", [write_recbole, write_100k, write_1m, write_25m])
def test_every_layout_reads_the_same(write, tmp_path):
    write(tmp_path)
    got = read(tmp_path)
    assert [got.raw_users[u] for u in got.user] == ["u1", "u2", "u1"]
    assert [got.items.raw[i] for i in got.item] == ["10", "20", "30"]
    assert got.items.titles == WANTED_TITLES
    assert got.items.years == [1999, 1995, 1995]
    assert got.items.categories == [movie[3] for movie in MOVIES]
    np.testing.assert_array_equal(got.rating, [4, 3, 5])
    np.testing.assert_array_equal(got.timestamp, [100, 90, 100])


def test_csv_maps_columns_and_takes_floats_as_times(tmp_path):
    path = tmp_path / "loans.csv"
    text = 'reader;isbn;stars;when;name;kind\na;1;2.5;99.9;"Sea; the ""deep"" one";x|y\nb;2;3;9007199254740993;Hill;\n'
    path.write_text(text, encoding="utf-8")
    columns = {"user": "reader", "item": "isbn", "rating": "stars", "timestamp": "when", "title": "name", "categories": "kind"}
    got = read(path, columns)
    assert got.items.titles == ['Sea; the "deep" one', "Hill"]
    assert got.items.categories == [["x", "y"], []]
    assert got.timestamp is not None
    assert got.timestamp.tolist() == [99900, 9007199254740993000], "an integer beyond 2**53 must keep its last digit"


def test_csv_without_title_or_time(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("user,item\na,x\na,y\n")
    got = read(path)
    assert got.items.titles == ["x", "y"]
    assert got.timestamp is None
    assert got.rating is None
    assert "raw item names" in got.notes[0]


def test_bad_rows_are_counted_by_reason_and_named(tmp_path):
    path = tmp_path / "bad.csv"
    rows = ["user,item,rating,timestamp", "a,x,4,1", "a,y,4", "", "a,z,many,2", ",z,1,3", "b,x,nan,3", "b,y,1,soon", "b,z,1,4"]
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError) as caught:
        read(path, bad=4)
    message = str(caught.value)
    assert message.startswith("data.max_bad_rows (4) is exceeded: 5 rows")
    assert f"{path}:3: 3 columns instead of 4" in message
    assert f"{path}:5: rating is not a number ('many'), 2 of this kind" in message
    assert f"{path}:6: empty user" in message
    assert f"{path}:8: timestamp is not a number ('soon')" in message
    assert "\n" not in message
    got = read(path, bad=5)
    assert len(got) == 2
    assert sum(got.bad_rows.values()) == 5
    assert "1 of this kind" in got.notes[-1]


def test_item_without_a_row_is_bad(tmp_path):
    write_recbole(tmp_path)
    with (tmp_path / "tiny.inter").open("a") as handle:
        handle.write("u9\t99\t5\t7\r\n")
    with pytest.raises(UserError, match=r"tiny.inter:5: item is not in tiny.item \('99'\)"):
        read(tmp_path)


def test_wrong_encoding_names_the_line(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("user,item\na,x\nb,é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.csv:3: .*UTF8"):
        read(path)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"user": "who"}, r"data.columns.user \(who\) is not a column .* user, item"),
        ({"usr": "user"}, "data.columns.usr is not a role"),
    ],
)
def test_columns_that_do_not_exist(columns, words, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("user,item\na,x\n")
    with pytest.raises(UserError, match=words):
        read(path, columns)


def test_columns_are_refused_where_they_have_no_effect(tmp_path):
    write_1m(tmp_path)
    with pytest.raises(UserError, match=r"data.columns has no effect"):
        read(tmp_path, {"user": "userId"})


def test_sources_that_fit_nothing_or_too_much(tmp_path):
    with pytest.raises(UserError, match=r"holds no files for data.format=auto"):
        read(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("user,item\n")
    with pytest.raises(UserError, match=r"2 .csv or .tsv files \(a.csv, b.csv\)"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"data.format=recbole; expected one NAME.inter"):
        read(tmp_path, format_name="recbole")


def test_an_empty_file_is_the_users_mistake(tmp_path):
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(UserError, match=r"x.csv:1: the first line is empty"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("Matrix, The", "The Matrix"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Big Blue, The (Grand bleu, Le)", "The Big Blue (Le Grand bleu)"),
        ("Star Maker, The (Uomo delle stelle, L')", "The Star Maker (L'Uomo delle stelle)"),
        ("Paris, Texas", "Paris, Texas"),
        ("Girl, Interrupted", "Girl, Interrupted"),
        ("Alice, The", "The Alice"),
        ("A, Anything", "A, Anything"),
    ],
)
def test_articles_go_back_in_front(written, wanted):
    assert restore_article(written) == wanted


def test_years_leave_titles():
    assert split_year("Heat (1995)") == ("Heat", 1995)
    assert split_year("Blade Runner 2049 (2017) ") == ("Blade Runner 2049", 2017)
    assert split_year("(500) Days") == ("(500) Days", None)
    assert split_year("(1922)") == ("(1922)", None), "a title never becomes empty"


def test_same_titles_get_a_year_only_where_needed_and_twins_merge():
    titles = ["Heat", "Heat", "Heat", "Twin", "Twin  ", "Lone"]
    years = [1995, 1986, 1995, 1997, 1997, 2000]
    categories = [["a"], [], ["a", "b"], [], [], []]
    got = make_distinct(ItemTable(list("pqrstu"), titles, list(years), categories))
    assert got.items.titles == ["Heat (1995)", "Heat (1986)", "Twin", "Lone"]
    assert got.items.raw == ["p", "q", "s", "u"]
    assert got.items.categories[0] == ["a", "b"]
    assert got.new_index.tolist() == [0, 1, 0, 2, 2, 3]
    assert (got.num_with_year, got.num_merged) == (2, 2)
    assert got.example_merged == "'Heat (1995)' is 'p' and 'r'"


def test_items_with_equal_titles_may_keep_their_identity():
    items = ItemTable(list("pqrst"), ["Heat", "Heat", "Twin", "Twin  ", "Lone"], [1995, 1986, 1997, 1997, 2000], [[]] * 5)
    got = make_distinct(items, merge=False)
    assert got.items.titles == ["Heat (1995)", "Heat (1986)", "Twin", "Twin", "Lone"]
    assert got.items.raw == list("pqrst")
    assert got.new_index.tolist() == [0, 1, 2, 3, 4]
    assert (got.num_with_year, got.num_merged, got.num_equal) == (2, 0, 2)


def test_an_empty_title_names_the_item():
    with pytest.raises(UserError, match=r"the item 'b' has an empty title"):
        make_distinct(ItemTable(["a", "b"], ["x", " \t"], [None, None], [[], []]))
