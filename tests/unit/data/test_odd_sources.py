"""Malformed sources: each gives one line with fault, place and remedy, or is read the same wherever it is cut."""

import errno
import gzip
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec_dist.config.schema import DataConfig
from rec_dist.data.prepare import prepare as prepare_module
from rec_dist.data.prepare.blockwise.driver import Sizes
from rec_dist.data.prepare.prepare import prepare
from rec_dist.data.sources import find_files, read_interactions
from rec_dist.data.sources.blocks import cut_text, whole
from rec_dist.data.sources.interactions import BadRows
from rec_dist.data.sources.preferences import PreferenceReader
from rec_dist.errors import DiskError, UserError
from rec_dist.runtime.messages import messages_to

SMALL = Sizes(block_bytes=120, partition_rows=9, range_rows=15, num_bins=16)
ROWS = "user,item,rating,timestamp\n" + "".join(f"u{n % 2},i{n // 2},3,{n}\n" for n in range(16))


def both(folder: Path, source: Path, **changes: object) -> list[str]:
    """Returns the last line of preparing in memory and through files. If both succeed, checks that they wrote the same bytes."""
    said = []
    for place in ("memory", "disk"):
        settings = {"split": "leave_one_out", "min_user_interactions": 1, "max_bad_rows": 9, **changes}
        config = DataConfig(source=str(source), path=str(folder / place), prepare_on=place, **settings)
        lines: list[str] = []
        try:
            with messages_to(lines.append):
                prepare(config, sizes=SMALL)
            said.append(" ".join(lines))
        except UserError as fault:
            said.append(str(fault))
    if (folder / "memory").is_dir():
        for path in (folder / "memory").iterdir():
            assert path.read_bytes() == (folder / "disk" / path.name).read_bytes(), path.name
    return said


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", ROWS.replace("\n", "\r").encode(), r"a.csv:1: lines end with a carriage return only"),
        ("a.inter", b"user_id:token\titem_id:token\ra\tb\r", r"a.inter:1: lines end with a carriage return only"),
        ("a.csv", ROWS.encode("utf-16"), r"a.csv:1: the first line is UTF-16"),
        ("a.csv", b'"us\ner",item\na,b\n', r"a.csv:1: a quote in the first line is never closed"),
        ("a.csv", b"user,item," + b"x" * 70_000 + b"\n", r"a.csv:1: the first line is longer than 65536 bytes"),
        (
            "a.csv",
            ",".join(f"column{n}" for n in range(5000)).encode() + b"\n",
            r"its columns are column0, .*\.\.\. \(5000 in all\)",
        ),
    ],
)
def test_what_is_no_header(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    for said in both(tmp_path, tmp_path / name):
        assert len(said) < 600
        assert re.search(words, said), said


@pytest.mark.parametrize(
    "time", ["0x1F", "+1700000000000000001", "1700000000000000001", "9223372036854775807", "-9223372036854775808", "007"]
)
def test_a_timestamp_means_the_same_whatever_stands_around_it(time, tmp_path):
    """Arrow converts a whole column or nothing, so a bad row must not change how its neighbours are read."""
    rows = [f"u,i{n},{time if n == 4 else 1700000000000000000 - n}" for n in range(40)]
    alone, among = tmp_path / "alone.csv", tmp_path / "among.csv"
    alone.write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    among.write_text("\n".join(["user,item,timestamp", *rows, "u,z,soon"]) + "\n")
    first, second = (read_interactions(find_files(path, "csv"), {}, 9) for path in (alone, among))
    assert first.timestamp is not None
    assert second.timestamp is not None
    assert first.timestamp.tolist() == second.timestamp.tolist()
    assert len(set(first.timestamp.tolist())) == len(first.timestamp), "no digit of nanoseconds may be lost"
    memory, disk = both(tmp_path, among)
    assert "train:" in memory
    assert "train:" in disk


def test_integers_beyond_64_bits_are_no_timestamps(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("user,item,timestamp\na,b,9223372036854775808\na,c,9223372036854775807\na,d,-9223372036854775809\n")
    got = read_interactions(find_files(path, "csv"), {}, 2)
    assert got.timestamp is not None
    assert got.timestamp.tolist() == [2**63 - 1]


def test_a_rating_that_32_bits_cannot_hold_is_a_bad_row(tmp_path):
    (tmp_path / "a.csv").write_text("user,item,rating\na,b,1e39\na,c,+4\n")
    got = read_interactions(find_files(tmp_path, "csv"), {}, 1)
    assert got.rating is not None
    assert got.rating.tolist() == [4.0]
    assert list(got.bad_rows) == ["rating is too large for 32 bits"]


def packed(text: str) -> bytes:
    data = bytearray(gzip.compress(text.encode()))
    data[12] ^= 0xFF  # zlib rejects these code lengths of the first block
    return bytes(data)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_flipped_byte_of_a_packed_file_is_named(place, tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(packed(ROWS + "".join(f"u,x{n * 7919 % 1000},1,{n}\n" for n in range(500))))
    with pytest.raises(UserError, match=r"a.csv.gz cannot be decompressed \(Error -3"):
        prepare(DataConfig(source=str(tmp_path), path=str(tmp_path / "out"), prepare_on=place))


def test_a_flipped_byte_of_packed_metadata_and_preferences_is_named(tmp_path):
    review = {"reviewerID": "u", "asin": "a", "overall": 1.0, "unixReviewTime": 1}
    (tmp_path / "R.json").write_text(json.dumps(review) + "\n")
    lines = "".join(json.dumps({"asin": f"a{n}", "title": f"T{n * 7919 % 1000}"}) + "\n" for n in range(300))
    (tmp_path / "meta_R.json.gz").write_bytes(packed(lines))
    with pytest.raises(UserError, match=r"meta_R.json.gz cannot be decompressed \(Error -3"):
        read_interactions(find_files(tmp_path, "amazon"), {}, 0)
    (tmp_path / "rows.jsonl.gz").write_bytes(packed(lines))
    with pytest.raises(UserError, match=r"rows.jsonl.gz cannot be decompressed \(Error -3"):
        list(PreferenceReader().read(tmp_path / "rows.jsonl.gz", BadRows()))


def test_a_full_disk_is_no_fault_of_the_packed_source(tmp_path):
    """/dev/full takes no byte, and the message must not advise to download the source again."""
    from rec_dist.data.sources.packed import unpack

    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(ROWS.encode() * 1000))
    with pytest.raises(OSError, match="No space left"):
        unpack(tmp_path / "a.csv.gz", Path("/dev/full"))


@pytest.mark.parametrize("name", ["a.csv", "a.inter", "a.jsonl", "a.parquet", "rows.jsonl"])
def test_folders_are_passed_over_and_links_to_nothing_named(name, tmp_path):
    kind = "preferences" if name == "rows.jsonl" else "auto"
    (tmp_path / "f" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no files for data.format"):
        find_files(tmp_path / "f", kind)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name} is not a file that can be read twice"):
        find_files(tmp_path / "g", kind)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match=r"pipe.csv is not a file that can be read twice"):
        find_files(tmp_path / "pipe.csv", "csv")


@pytest.mark.parametrize("header", ["movieId,name,genres", "movieId,title", ""])
def test_movies_without_a_column_are_named(header, tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,1,1\n")
    (tmp_path / "movies.csv").write_text(f"{header}\n1,a,b\n")
    with pytest.raises(UserError, match=r"movies.csv:1: the (column '(title|genres)' is missing|first line is empty)"):
        read_interactions(find_files(tmp_path, "auto"), {}, 0)


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"reviewerID": "u", "asin": "a", "overall": 1.0, "unixReviewTime": 10**30}).encode(),
        json.dumps({"reviewerID": "u", "asin": "a", "overall": 1.0, "unixReviewTime": 2**63}).encode(),
        b"[" * 100_000,
        b'{"reviewerID": "caf\xe9", "asin": "a", "overall": 1, "unixReviewTime": 1}',
        b'{"reviewerID": "u", "asin": "caf\xe9", "overall": 1, "unixReviewTime": 1}',
        b'{"reviewerID": "u\\ud800", "asin": "a", "overall": 1, "unixReviewTime": 1}',
    ],
)
def test_a_review_that_cannot_be_read_is_a_bad_row(line, tmp_path):
    good = json.dumps({"reviewerID": "u", "asin": "a", "overall": 1.0, "unixReviewTime": 1}).encode()
    (tmp_path / "R.json").write_bytes(good + b"\n" + line + b"\n")
    got = read_interactions(find_files(tmp_path, "amazon"), {}, 1)
    assert len(got) == 1
    assert sum(got.bad_rows.values()) == 1
    assert "R.json:2" in got.notes[-1]


@pytest.mark.parametrize("number", [10**30, 2**63, 10**400])
def test_a_large_rating_of_a_review_means_the_same_beside_a_bad_line(number, tmp_path):
    rows = [{"reviewerID": "u", "asin": f"a{n}", "overall": number if n == 3 else 4.0, "unixReviewTime": n} for n in range(20)]
    (tmp_path / "R.json").write_text("".join(json.dumps(row) + "\n" for row in rows) + "junk\n")
    memory, disk = both(tmp_path, tmp_path / "R.json")
    assert "train:" in memory
    assert "train:" in disk


def test_a_review_longer_than_what_is_looked_at_first(tmp_path):
    review = {"reviewText": "x" * 100_000, "reviewerID": "u", "asin": "a", "overall": 1.0, "unixReviewTime": 1}
    (tmp_path / "R.json").write_text(json.dumps(review) + "\n")
    assert len(read_interactions(find_files(tmp_path, "amazon"), {}, 0)) == 1


def table(**changes: pa.Array) -> pa.Table:
    columns = {"user": pa.array([f"u{n % 2}" for n in range(16)]), "item": pa.array([f"i{n // 2}" for n in range(16)])}
    return pa.table({**columns, "timestamp": pa.array(range(16)), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"user": pa.array([{"a": n} for n in range(16)])}, r"the column user is of type struct.* which cannot be a user"),
        ({"rating": pa.array(range(16), pa.timestamp("ms"))}, r"the column rating is of type timestamp.* cannot be a rating"),
        ({"timestamp": pa.array([[n] for n in range(16)])}, r"the column timestamp is of type list"),
        ({"title": pa.array([[["a"]]] * 16)}, r"the column title is of type list"),
        ({"user": pa.array([b"\xff\xfe"] * 16)}, r"cannot be read \(the column user: Invalid UTF8"),
        ({"user": pa.array([b"\xff\xfe"] * 16).view(pa.string())}, r"cannot be read \(.*[Ii]nvalid UTF8"),
        ({"timestamp": pa.array([2**64 - 1] * 16, pa.uint64())}, r"max_bad_rows \(9\).*timestamp is not a number"),
    ],
)
def test_parquet_columns_that_cannot_play_their_role(changes, words, tmp_path):
    pq.write_table(table(**changes), tmp_path / "a.parquet")
    for said in both(tmp_path, tmp_path / "a.parquet"):
        assert re.search(words, said), said


def test_parquet_types_that_can(tmp_path):
    clock = pa.array(range(16), pa.int32()).cast(pa.time32("s"))
    for kind in (
        clock,
        pa.array(range(16)).cast(pa.decimal128(24, 2)),
        pa.array([str(n) for n in range(16)]).dictionary_encode(),
    ):
        pq.write_table(table(timestamp=kind), tmp_path / "a.parquet")
        got = read_interactions(find_files(tmp_path, "parquet"), {}, 0)
        assert got.timestamp is not None
        assert (got.timestamp[1:] > got.timestamp[:-1]).all()


def test_parquet_with_two_columns_of_a_name_or_no_row(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=["user", "item", "user"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"two columns are named .user."):
        read_interactions(find_files(tmp_path, "parquet"), {}, 0)
    pq.write_table(table().slice(0, 0), tmp_path / "a.parquet")
    for said in both(tmp_path, tmp_path / "a.parquet"):
        assert "holds no readable row" in said


@pytest.mark.parametrize("after", [",", "\t"])
def test_blocks_end_between_rows_where_a_quote_stands_inside_a_cell(after, tmp_path):
    """A lone quote in a cell is an ordinary character, so the text after it is not inside a quoted cell."""
    rows = [f'u{after}12" disk', f'u{after}"two\nlines"', f'v{after}"a ""b""\n, c"', f'w{after}5"', f'"x\ny"{after}z'] * 9
    path = tmp_path / "x"
    path.write_text("".join(f"{row}\n" for row in rows))
    ends, place = {0}, 0
    for row in rows:
        place += len(row) + 1
        ends.add(place)
    for size in range(1, 40):
        blocks = cut_text(whole(0, path), quoted_after=after, size=size)
        assert {block.end for block in blocks} <= ends, size
        assert len(blocks) > 5


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", b"prompt,chosen,rejected,rejected\np,a,b,c\n", r"two columns are named .rejected."),
        (
            "a.csv",
            b"prompt,chosen,rejected\n" + b"x" * 17_000_000 + b",a,b\n",
            r"cannot be read as csv \(field larger .* JSON lines",
        ),
        ("a.json", b"[" * 100_000, r"a.json cannot be read \(maximum recursion"),
    ],
)
def test_preference_files_that_cannot_be_read(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        list(PreferenceReader().read(tmp_path / name, BadRows()))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "p\\ud800", "chosen": "a", "rejected": "b"}', "prompt holds half a character"),
        ('{"prompt": "p", "chosen": "a", "rejected": ["b\\udfff"]}', "rejected holds half a character"),
        ('{"prompt":' + "[" * 100_000, "not a JSON object"),
        ('{"prompt": "p", "chosen": "a", "rejected' + "9" * 5000 + '": "b"}', "no rejected completion"),
    ],
)
def test_preference_rows_that_cannot_be_written(line, reason, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + '\n{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    bad = BadRows()
    assert len(list(PreferenceReader().read(tmp_path / "a.jsonl", bad))) == 1
    assert bad.counts == {reason: 1}


def test_a_comma_without_quotes_in_a_preference_is_a_bad_row(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\np,a,b\np,a,The Good, the Bad\n")
    bad = BadRows()
    assert [row.completions for row in PreferenceReader().read(tmp_path / "a.csv", bad)] == [["a", "b"]]
    assert bad.counts == {"4 columns instead of 3": 1}


def test_a_json_array_behind_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "p", "chosen": "a", "rejected": "b"}]), encoding="utf-8-sig")
    assert len(list(PreferenceReader().read(tmp_path / "a.json", BadRows()))) == 1


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_source_that_changes_while_it_is_read_is_refused(place, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text(ROWS)
    opened = prepare_module.open_source

    def replace_first(*arguments, **options):
        (tmp_path / "a.csv").write_text(ROWS + "u1,late,3,99\n")
        return opened(*arguments, **options)

    monkeypatch.setattr(prepare_module, "open_source", replace_first)
    config = DataConfig(source=str(tmp_path), path=str(tmp_path / "out"), prepare_on=place, split="leave_one_out")
    with pytest.raises(UserError, match=r"a.csv changed while it was read"):
        prepare(config)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("name", ["file/out", "file/deep/out", "link", "loop/out", "x" * 300, "nul\0", "/proc/d"])
def test_a_path_that_cannot_hold_a_folder_is_refused(name, tmp_path):
    (tmp_path / "a.csv").write_text(ROWS)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(path.name for path in tmp_path.iterdir())
    config = DataConfig(source=str(tmp_path / "a.csv"), path=str(tmp_path / name), split="leave_one_out")
    with pytest.raises(UserError, match=r"data.path .*choose another folder"):
        prepare(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_is_named_with_its_place(tmp_path, monkeypatch):
    """The error of a full disk names no file, but the message must name the folder, and nothing may be left there."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.csv").write_text(ROWS)
    monkeypatch.setattr(prepare_module, "prepare_in_memory", full)
    config = DataConfig(source=str(tmp_path), path=str(tmp_path / "out"), prepare_on="memory", split="leave_one_out")
    with pytest.raises(DiskError, match=rf"^{re.escape(str(tmp_path))}/out: No space left on device .*free space there"):
        prepare(config)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
