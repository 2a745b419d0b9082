"""MovieLens as GroupLens publishes it.

The files are u.data and u.item (100K), ratings.dat and movies.dat (1M and 10M), or ratings.csv and movies.csv (20M and later).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rec_dist.data.sources.assemble import unique_items
from rec_dist.data.sources.blocks import whole
from rec_dist.data.sources.delimited import DelimitedRows
from rec_dist.data.sources.header import read_header, require_columns
from rec_dist.data.sources.interactions import BadRows, ItemTable
from rec_dist.data.sources.quotes import Quoting, quoting_of
from rec_dist.data.sources.roles import Roles
from rec_dist.data.sources.source import Source
from rec_dist.data.sources.table import Table, parse_table
from rec_dist.data.sources.titles import restore_article, split_year

# The order of u.item's last 19 columns, as u.genre lists them.
_GENRES = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
        "Film-Noir",
    ),
    *("Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_NO_GENRES = "(no genres listed)"
_MOVIE_NAMES = ("movieId", "title", "genres")


@dataclass(frozen=True)
class Layout:
    """One way in which MovieLens was published. Names of columns are None if the file has a header, and ours otherwise."""

    ratings: str
    movies: str
    ratings_delimiter: str
    movies_delimiter: str
    ratings_names: Sequence[str] | None
    movies_names: Sequence[str] | None
    encoding: str
    quoted: bool


_RATING_NAMES = ("userId", "movieId", "rating", "timestamp")
LAYOUTS = (
    Layout(
        *("u.data", "u.item", "\t", "|", _RATING_NAMES),
        movies_names=("movieId", "title", "release", "video_release", "url", *_GENRES),
        encoding="latin-1",
        quoted=False,
    ),
    Layout(
        *("ratings.dat", "movies.dat", "::", "::", _RATING_NAMES),
        movies_names=_MOVIE_NAMES,
        encoding="latin-1",
        quoted=False,
    ),
    Layout("ratings.csv", "movies.csv", ",", ",", None, None, encoding="utf8", quoted=True),
)


def open_movielens(ratings: Path, movies: Path) -> Source:
    """Opens a pair of files with the names of a layout. The year in a title becomes the year of the item.

    Tries movies.dat as UTF-8 first: that of 10M is UTF-8, that of 1M is Latin-1.
    """
    layout = next(known for known in LAYOUTS if known.ratings == ratings.name)
    bad = BadRows(file=1)
    names, skip = _names(ratings, layout.ratings_names, layout.ratings_delimiter)
    notes: list[str] = []
    quoting = _quoting(ratings, layout.ratings_delimiter, layout, notes)
    rows = DelimitedRows(names, layout.ratings_delimiter, quoting, Roles(*_RATING_NAMES), items_path=movies)
    require_columns(ratings, names, _RATING_NAMES)
    items = _read_movies(movies, layout, bad, notes)
    return Source([whole(0, ratings, skip)], rows, header_lines=int(skip > 0), items=items, bad=bad, notes=notes)


def _quoting(path: Path, delimiter: str, layout: Layout, notes: list[str]) -> Quoting:
    return quoting_of(path, delimiter, notes) if layout.quoted else "none"


def _names(path: Path, names: Sequence[str] | None, delimiter: str) -> tuple[list[str], int]:
    return read_header(path, delimiter, quoted=True) if names is None else (list(names), 0)


def _read_movies(path: Path, layout: Layout, bad: BadRows, notes: list[str]) -> ItemTable:
    encoding = layout.encoding
    if encoding == "latin-1" and _is_utf8(path):
        encoding = "utf8"
    names, skip = _names(path, layout.movies_names, layout.movies_delimiter)
    require_columns(path, names, layout.movies_names or _MOVIE_NAMES)
    table = parse_table(
        whole(1, path, skip),
        bad,
        names=names,
        delimiter=layout.movies_delimiter,
        quoting=_quoting(path, layout.movies_delimiter, layout, notes),
        encoding=encoding,
        lines_before=int(skip > 0),
    )
    cut = [split_year(text) for text in table.texts("title")]
    items = ItemTable(
        raw=table.texts("movieId"),
        titles=[restore_article(title) for title, _ in cut],
        years=[year for _, year in cut],
        categories=_genres(table),
    )
    return unique_items(table, "movieId", items, bad)


def _genres(table: Table) -> list[list[str]]:
    if "genres" in table.names:
        return [[] if text == _NO_GENRES else [g for g in text.split("|") if g] for text in table.texts("genres")]
    flags = zip(*(table.texts(genre) for genre in _GENRES), strict=True)
    return [[genre for genre, flag in zip(_GENRES, row, strict=True) if flag == "1"] for row in flags]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
