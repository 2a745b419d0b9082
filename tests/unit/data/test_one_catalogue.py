"""One small catalogue in every format, type, packing and order, with the dirt of real files: the data set is the same, or the
summary counts the difference.

What a file changes is drawn by hypothesis; what must come out is known by construction, so a fault in a reader cannot hide.
"""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prepare.blockwise.driver import Sizes
from rec_dist.data.prepare.prepare import prepare

NUM_USERS, NUM_ITEMS = 5, 8
TITLES = ["Caf\u00e9 Noir", "Tom & Jerry", 'The "Best" of', "\u0416\u0443\u043a; 2", "A, B", "Plain", '12" Records', "Tab Less"]
PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
FORMATS = ("csv", "tsv", "semicolon", "pipe", "parquet", "recbole", "amazon")
TIMES = ("integers", "ms", "ns", "fractions", "below one", "iso", "iso with zone", "datetime")
DIRT = ("entity", "decomposed", "zero width", "blanks", "other title", "empty title first")  # of a title
FAULTS = ("short row", "no user", "bad time", "untitled item")  # bad rows


@dataclass
class Drawn:
    """What a file holds, and how it is written. dirt: (item, kind); faults: kinds of bad rows to add."""

    format: str
    packing: str
    times: str
    float_ids: bool
    shuffle: int
    dirt: dict[int, str]
    faults: list[str]
    header: tuple[str, str, str, str]


drawn = st.builds(
    Drawn,
    format=st.sampled_from(FORMATS),
    packing=st.sampled_from(sorted(PACKERS)),
    times=st.sampled_from(TIMES),
    float_ids=st.booleans(),
    shuffle=st.integers(0, 2**32 - 1),
    dirt=st.dictionaries(st.integers(0, NUM_ITEMS - 1), st.sampled_from(DIRT), max_size=4),
    faults=st.lists(st.sampled_from(FAULTS), max_size=3),
    header=st.sampled_from([("user", "item", "timestamp", "title"), ("userId", "movieId", "time", "name")]),
)


def wanted() -> dict[str, list[int]]:
    """user -> items in the order of time."""
    rng = np.random.default_rng(0)
    return {f"{user + 1}": rng.permutation(NUM_ITEMS)[: 5 + user % 3].tolist() for user in range(NUM_USERS)}


def time_of(place: int, kind: str) -> Any:
    clock = datetime.datetime(2024, 2, 29, 23, 59, 59, tzinfo=datetime.UTC) + datetime.timedelta(milliseconds=100 * place)
    return {
        "integers": 1600000000 + place,
        "ms": 1600000000000 + place,
        "ns": 1600000000000000000 + place,
        "fractions": 1600000000 + place / 1024,
        "below one": place / 1024,
        "iso": clock.strftime("%Y-%m-%d %H:%M:%S.%f"),
        "iso with zone": clock.astimezone(datetime.timezone(datetime.timedelta(hours=place % 12))).isoformat(),
        "datetime": clock,
    }[kind]


def dirty(title: str, kind: str | None) -> str:
    """The title as a file may hold it, which reads the same."""
    if kind == "entity":
        return "&#" + str(ord(title[0])) + ";" + title[1:].replace("&", "&amp;")
    if kind == "decomposed":
        return title.replace("\u00e9", "e\u0301")
    if kind == "zero width":
        return f"{title[:2]}\u200b{title[2:]}"
    return title.replace(" ", "  ") if kind == "blanks" else title


def rows_of(case: Drawn) -> list[tuple[Any, Any, Any, str]]:
    """(user, item, time, title) in the order of the file, without faults."""
    order = [(user, item) for user, items in wanted().items() for item in items]
    at = {pair: place for place, pair in enumerate(order)}
    rows = []
    for place in np.random.default_rng(case.shuffle).permutation(len(order)).tolist():
        user, item = order[place]
        rows.append((user, f"{item + 101}", time_of(at[user, item], case.times), dirty(TITLES[item], case.dirt.get(item))))
    seen: dict[str, int] = {}
    for number, (user, name, time, title) in enumerate(rows):
        kind = case.dirt.get(int(name) - 101)
        if kind == "empty title first" and seen.get(name, 0) == 0 and sum(row[1] == name for row in rows) > 1:
            rows[number] = (user, name, time, "")
        if kind == "other title" and seen.get(name, 0) == 1:
            rows[number] = (user, name, time, f"{title} (again)")
        seen[name] = seen.get(name, 0) + 1
    return rows


def with_faults(case: Drawn, rows: list[tuple[Any, Any, Any, str]]) -> list[tuple[Any, Any, Any, str]]:
    more = {
        "no user": ("", "101", rows[0][2], TITLES[0]),
        "bad time": ("1", "101", "soon", TITLES[0]),
        "untitled item": ("1", "999", rows[0][2], ""),
    }
    return rows + [more[fault] for fault in case.faults if fault in more]


def save(case: Drawn, folder: Path) -> int:
    """Writes the files, and returns how many rows are bad."""
    rows = with_faults(case, rows_of(case))
    if case.format == "parquet":
        return save_parquet(case, rows, folder)
    if case.format == "amazon":
        return save_amazon(case, rows, folder)
    separator = {"csv": ",", "tsv": "\t", "semicolon": ";", "pipe": "|", "recbole": "\t"}[case.format]
    cells = [[str(cell.isoformat() if isinstance(cell, datetime.datetime) else cell) for cell in row] for row in rows]
    short = case.faults.count("short row")
    if case.format == "recbole":
        titles: dict[str, str] = {}
        for _, name, _, title in cells:
            titles[name] = titles.get(name) or title
        header = "user_id:token\titem_id:token\ttimestamp:float"
        lines = [header, *("\t".join(row[:3]) for row in cells), *["1\t101"] * short]
        (folder / "a.inter").write_text("\n".join(lines), encoding="utf-8")
        items = ["item_id:token\ttitle:token_seq", *map("\t".join, titles.items())]
        (folder / "a.item").write_text("\n".join(items), encoding="utf-8")
        return len(case.faults)
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator="\r\n" if case.shuffle % 2 else "\n")
    writer.writerow(case.header)
    writer.writerows(cells)
    writer.writerows([["1", "101"]] * short)
    suffix = "tsv" if case.format == "tsv" else "csv"
    (folder / f"a.{suffix}{case.packing}").write_bytes(PACKERS[case.packing](out.getvalue().encode()))
    return len(case.faults)


def save_parquet(case: Drawn, rows: list[tuple[Any, Any, Any, str]], folder: Path) -> int:
    users, items, times, titles = map(list, zip(*rows, strict=True))
    bad_times = case.faults.count("bad time")
    times = [None if time == "soon" else time for time in times]
    columns = [users, items, times, titles]
    if case.float_ids:  # as pandas has a column of ids with gaps
        columns[0] = [float(user) if user else None for user in users]
        columns[1] = [float(item) for item in items]
    arrays = [pa.array(values) for values in columns]
    if case.shuffle % 3 == 0:
        arrays[3] = arrays[3].dictionary_encode()
    pq.write_table(pa.Table.from_arrays(arrays, names=case.header), folder / "a.parquet", row_group_size=7)
    return case.faults.count("no user") + bad_times + case.faults.count("untitled item")


def save_amazon(case: Drawn, rows: list[tuple[Any, Any, Any, str]], folder: Path) -> int:
    """Its timestamps are numbers. The order of dates is that of their places."""
    titles: dict[str, str] = {}
    for _, name, _, title in rows:
        titles[name] = titles.get(name) or title
    lines = []
    for user, name, time, _ in rows:
        clock = datetime.datetime.fromisoformat(time) if isinstance(time, str) and time != "soon" else time
        number = int(clock.timestamp() * 1e6) if isinstance(clock, datetime.datetime) else clock
        lines.append(json.dumps({"user_id": user, "parent_asin": name, "rating": 4.0, "timestamp": number}))
    lines += ["{"] * case.faults.count("short row")
    (folder / f"Toys.jsonl{case.packing}").write_bytes(PACKERS[case.packing]("\n".join(lines).encode()))
    meta = [json.dumps({"parent_asin": name, "title": title}) for name, title in titles.items()]
    (folder / f"meta_Toys.jsonl{case.packing}").write_bytes(PACKERS[case.packing]("\n".join(meta).encode()))
    return len(case.faults)


def check(case: Drawn) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "in").mkdir()
        num_bad = save(case, folder / "in")
        where = "disk" if case.shuffle % 5 == 0 else "memory"
        config = DataConfig(
            source=str(folder / "in"),
            path=str(folder / "out"),
            split="leave_one_out",
            min_user_interactions=1,
            max_bad_rows=num_bad,
            prepare_on=where,
        )
        prepare(config, sizes=Sizes(block_bytes=300, partition_rows=11, range_rows=13, num_bins=16))
        data = PreparedData.open(folder / "out")
        split = data.split("test")
        found = {split.shards.raw_user(row): [data.titles[item] for item in split.items_of(row)] for row in range(len(split))}
    renamed = {item for item, kind in case.dirt.items() if kind == "other title"}
    for user, items in wanted().items():
        for title, item in zip(found[user], items, strict=True):
            assert title == TITLES[item] or (item in renamed and title == f"{TITLES[item]} (again)"), (title, TITLES[item])
    assert sum(data.manifest.bad_rows.values()) == num_bad
    notes = " ".join(data.manifest.notes)
    used = {item for items in wanted().values() for item in items}
    for kind, words in (("entity", "HTML entities"), ("zero width", "zero-width characters")):
        if any(case.dirt.get(item) == kind for item in used):
            assert words in notes
    if any(case.dirt.get(item) == "decomposed" and "\u00e9" in TITLES[item] for item in used):
        assert "form NFC" in notes
    if case.times in ("fractions", "below one", "iso"):
        assert "timestamps have a fraction" in notes or case.format == "amazon"


COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@given(drawn)
@settings(max_examples=40, derandomize=True, **COMMON)
def test_the_data_set_is_the_same_or_the_difference_is_counted(case: Drawn) -> None:
    check(case)


@pytest.mark.slow
@given(drawn)
@settings(max_examples=2000, **COMMON)
def test_the_same_for_many_files(case: Drawn) -> None:
    check(case)
