"""A bad row is named by file and line, and ties keep the order of the file: in all formats, packed or not, however they are cut.

For Parquet the number behind the file is that of the row in it.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prepare.blockwise.driver import Sizes
from rec_dist.data.prepare.prepare import prepare
from rec_dist.errors import UserError

NUM_USERS, PER_USER, BAD = 5, 16, 61
PIECES = {
    "memory": None,
    "one piece": Sizes(1 << 20, 1 << 20, 1 << 20, 4),
    "pieces": Sizes(block_bytes=300, partition_rows=25, range_rows=20, num_bins=16),
    "crumbs": Sizes(block_bytes=60, partition_rows=7, range_rows=5, num_bins=64),
}
ROWS = [(f"u{n % NUM_USERS}", f"i{n // NUM_USERS * 7 % PER_USER}") for n in range(NUM_USERS * PER_USER)]  # each pair once


def table(title: Callable[[str], str], *, bad: bool) -> str:
    """Rows of csv. title: the cell of an item's title."""
    lines = [f"{user},{item},{'soon' if bad and n == BAD else 5},{title(item)}" for n, (user, item) in enumerate(ROWS)]
    return "\n".join(["user,item,timestamp,title", *lines]) + "\n"


def csv(folder: Path, *, bad: bool) -> str:
    (folder / "log.csv").write_text(table(lambda item: f"Film {item}", bad=bad))
    return f"log.csv:{BAD + 2}: timestamp is not a number ('soon')"


def csv_of_cells_with_lines(folder: Path, *, bad: bool) -> str:
    """A title takes one line for odd items and three for even ones, and holds quotes, so most rows begin outside of their number."""
    text = table(lambda item: f'"The ""{item}""\r\n\nfilm"' if int(item[1:]) % 2 == 0 else f"Film {item}", bad=bad)
    (folder / "log.csv").write_bytes(text.encode())
    line = text[: text.index("soon")].count("\n") + 1 if bad else 0
    assert not bad or line > BAD + 20
    return f"log.csv:{line}: timestamp is not a number ('soon')"


def csv_with_a_short_row(folder: Path, *, bad: bool) -> str:
    """The bad row has too few cells, one of which holds a line end; blank lines count as lines."""
    lines = table(lambda item: f'"Film\n{item}"' if item == "i7" else f"Film {item}", bad=False).replace("\n", "\n\n", 1)
    at = lines.index(",".join(ROWS[BAD]))
    (folder / "log.csv").write_text(lines[:at] + ('"one\ncell"\n' if bad else "") + lines[at:])
    return f"log.csv:{lines[:at].count(chr(10)) + 1}: 1 column instead of 4 ('\"one\\ncell\"')"


def reviews(folder: Path, *, bad: bool) -> str:
    rows = [{"reviewerID": user, "asin": item, "overall": 3.0, "unixReviewTime": 5} for user, item in ROWS]
    lines = [json.dumps(row) for row in rows]
    lines[3] += "\n"  # a blank line
    lines[BAD] = lines[BAD].replace("3.0", '"x"') if bad else lines[BAD]
    (folder / "Log.jsonl").write_text("\n".join(lines) + "\n")
    return f"Log.jsonl:{BAD + 2}: overall is text, not a number"


def interactions(folder: Path, *, bad: bool) -> str:
    lines = [f"{user}\t{item}\t{'soon' if bad and n == BAD else 5}\n" for n, (user, item) in enumerate(ROWS)]
    (folder / "log.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(lines))
    return f"log.inter:{BAD + 2}: timestamp is not a number ('soon')"


def parquet(folder: Path, *, bad: bool) -> str:
    users, items = ([row[place] for row in ROWS] for place in (0, 1))
    whole = pa.table(
        {"user": [None if bad and n == BAD else user for n, user in enumerate(users)], "item": items, "time": [5] * len(ROWS)}
    )
    for name, begin in (("a", 0), ("b", 33)):
        pq.write_table(whole.slice(begin, 33 if name == "a" else None), folder / f"{name}.parquet", row_group_size=6)
    return f"b.parquet:{BAD - 33 + 1}: empty user"


FORMATS = [csv, csv_of_cells_with_lines, csv_with_a_short_row, reviews, interactions, parquet]


@pytest.mark.parametrize(
    ("write", "is_packed"), [(write, False) for write in FORMATS] + [(write, True) for write in FORMATS[:-1]]
)
def test_a_bad_row_is_named_by_file_and_line(write: Callable[..., str], is_packed: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    place = write(source, bad=True)
    if is_packed:
        packed(source)
    for name, sizes in PIECES.items():
        with pytest.raises(UserError) as caught:
            prepared(source, tmp_path / "out", sizes)
        assert f"{source}/{place}" in str(caught.value), name
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", FORMATS)
def test_ties_keep_the_order_of_the_file(write: Callable[..., str], tmp_path: Path) -> None:
    """All rows have the same time."""
    source = tmp_path / "source"
    source.mkdir()
    write(source, bad=False)
    wanted = {f"u{user}": [item for name, item in ROWS if name == f"u{user}"] for user in range(NUM_USERS)}
    for name, sizes in PIECES.items():
        prepared(source, tmp_path / name, sizes)
        data = PreparedData.open(tmp_path / name)
        test = data.split("test")
        users = test.names_of(np.arange(len(test)))
        found = {user: [data.raw_items[item] for item in test.items_of(row)] for row, user in enumerate(users)}
        assert list(found) == list(wanted), "users are in the order of their first row"
        assert found == wanted, name


def packed(folder: Path) -> None:
    """Packs the files of a folder under the names that they have, since their first bytes tell."""
    for path in folder.iterdir():
        path.write_bytes(gzip.compress(path.read_bytes()))


def prepared(source: Path, target: Path, sizes: Sizes | None) -> None:
    place = "memory" if sizes is None else "disk"
    config = DataConfig(source=str(source), path=str(target), prepare_on=place, split="leave_one_out", min_user_interactions=1)
    prepare(config, sizes=sizes)


def test_a_line_of_two_objects_is_a_bad_row_however_the_file_is_cut(tmp_path: Path) -> None:
    """With a blank line elsewhere there are as many objects as lines."""
    reviews(tmp_path, bad=False)
    lines = (tmp_path / "Log.jsonl").read_text().splitlines()
    (tmp_path / "Log.jsonl").write_text("\n".join([*lines[:9], lines[9] + lines[10], *lines[11:]]) + "\n")
    for name, sizes in PIECES.items():
        with pytest.raises(UserError, match=r"Log\.jsonl:10: not a JSON object of a review") as caught:
            prepared(tmp_path, tmp_path / "out", sizes)
        assert "1 rows cannot be read" in str(caught.value), name


def test_a_row_longer_than_a_mebibyte_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(table(lambda item: f'"{"x" * (3 << 20)}"' if item == "i7" else f"Film {item}", bad=False))
    config = DataConfig(source=str(tmp_path), path=str(tmp_path / "out"), split="leave_one_out", min_user_interactions=1)
    assert prepare(config).counts["raw_rows"] == len(ROWS)
