"""verify finds damage that Arrow does not notice: flipped bits, truncated files, swapped files."""

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import Manifest, read_arrow
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.dataset.schema import ITEM_SCHEMA, SEQUENCE_SCHEMA
from rec_dist.data.dataset.verify import verify
from rec_dist.data.prepare.prepare import prepare
from rec_dist.errors import UserError
from rec_dist.storage.files import fingerprint, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = "user,item,timestamp\n" + "".join(f"u{u},i{(u + i) % 7},{i}\n" for u in range(20) for i in range(5))
    (tmp_path / "log.csv").write_text(text)
    target = tmp_path / "out"
    prepare(DataConfig(source=str(tmp_path / "log.csv"), path=str(target), split="leave_one_out"))
    return target


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def item_byte(path: Path) -> int:
    """The place in the file of the value 6 (int32) in some list of items."""
    return path.read_bytes().index((6).to_bytes(4, "little") + (0).to_bytes(4, "little"))


def test_a_whole_data_set_has_no_problems(folder):
    assert verify(folder) == []
    with pa.memory_map(str(folder / "train-00000-of-00002.arrow")) as mapped:
        assert pa.ipc.open_file(mapped).read_all().schema.equals(SEQUENCE_SCHEMA)
    with pa.memory_map(str(folder / "items.arrow")) as mapped:
        assert pa.ipc.open_file(mapped).read_all().schema.equals(ITEM_SCHEMA)


def test_a_flipped_bit_reads_fine_and_is_found(folder):
    shard = folder / "train-00001-of-00002.arrow"
    before_rows = read_arrow(folder / "train-00000-of-00002.arrow")["items"].to_pylist()
    before = read_arrow(shard)["items"].to_pylist()
    flip(shard, item_byte(shard))
    assert before != read_arrow(shard)["items"].to_pylist(), "the flip is in the items, and Arrow says nothing"
    problems = verify(folder)
    assert len(problems) == 1
    assert "train-00001-of-00002.arrow has changed" in problems[0]
    split = PreparedData.open(folder).split("train")
    assert split.items_of(0).tolist() == before_rows[0], "a row of the other shard"
    with pytest.raises(UserError, match=r"train-00001-of-00002.arrow has changed"):
        split.items_of(len(split) - 1)


def test_every_byte_of_the_manifest_counts(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        flip(path, position)
        assert len(verify(folder)) == 1, position
        path.write_bytes(whole)
    path.write_bytes(whole.replace(b"\n", b" ", 1))
    (problem,) = verify(folder)
    assert problem.startswith(f"{path} does not match its checksum")


def paths_in(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in a JSON document, including mappings and lists."""
    yield above
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths_in(value[key], (*above, key))


@pytest.mark.parametrize("other", [None, -1, "x", [], {}, True, 1.5, [1], {"a": 1}])
def test_a_manifest_of_other_types_is_one_line_even_if_its_checksum_is_right(other, folder):
    path = folder / "manifest.json"
    whole = json.loads(path.read_bytes())
    for place in paths_in(whole):
        if not place or place[0] == "checksum":
            continue
        body = copy.deepcopy(whole)
        del body["checksum"]
        at = body
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = other
        write_json(path, {**body, "checksum": fingerprint(body)})
        for line in verify(folder):
            assert "\n" not in line, place
        with suppress(UserError):  # no other exception is allowed
            PreparedData.open(folder, cache=str(folder.parent / "cache"))


def test_a_truncated_shard_is_found(folder):
    shard = folder / "test-00000-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    assert "bytes, not" in verify(folder)[0]
    with pytest.raises(UserError, match=r"is damaged"):
        PreparedData.open(folder)


def test_missing_and_stray_files_are_found(folder):
    (folder / "items.arrow").unlink()
    (folder / "train-00000-of-00001.arrow").write_bytes(b"")
    problems = verify(folder)
    assert any("items.arrow is missing" in line for line in problems)
    assert any("train-00000-of-00001.arrow: the manifest does not name this file" in line for line in problems)


def test_a_file_of_another_schema_is_found_even_if_its_hash_is_right(folder):
    from dataclasses import replace

    from rec_dist.storage.checksums import describe

    manifest = Manifest.load(folder)
    shard = folder / manifest.splits["valid"].shards[0].name
    with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, ITEM_SCHEMA) as writer:
        writer.write_table(ITEM_SCHEMA.empty_table())
    entry = manifest.splits["valid"]
    forged = replace(entry, shards=[describe(shard, entry.shards[0].rows), *entry.shards[1:]])
    replace(manifest, splits={**manifest.splits, "valid": forged}).save(folder)
    problems = verify(folder)
    assert len(problems) == 1
    assert f"{shard}: the columns are" in problems[0]
    with pytest.raises(UserError, match=r"valid-00000-of-00002.arrow: the columns are .*schema"):
        PreparedData.open(folder).split("valid").items_of(0)


def test_loading_nothing_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"data.path \(.*nowhere\) .* run `rec-dist prepare CONFIG`"):
        Manifest.load(tmp_path / "nowhere")
    assert len(verify(tmp_path / "nowhere")) == 1


def test_another_format_version_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 99'))
    with pytest.raises(UserError, match=r"format version 99, this release reads 3"):
        Manifest.load(folder)


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(UserError, match=r"dev is not a split .* train, valid, test"):
        PreparedData.open(folder).split("dev")


def test_one_shard_is_a_view_of_the_file(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "".join(f"u,i{i},{i}\n" for i in range(9)))
    settings = DataConfig(source=str(tmp_path / "log.csv"), path=str(tmp_path / "out"), split="leave_one_out", num_shards=1)
    prepare(settings)
    allocated = pa.total_allocated_bytes()
    split = PreparedData.open(tmp_path / "out").split("train")
    assert pa.total_allocated_bytes() - allocated < 4096
    assert split.items_of(0).base is not None
    assert split.items_of(0).tolist() == list(range(7))
