"""MiniOneRec's and BEAR's files: found, stitched to sequences without loss or repetition, and split by users."""

import gzip
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_files import TEST, TITLES, TRAIN, VALID, Window, bear_text, minionerec_text, write_bear, write_minionerec

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prepare import splits
from rec_dist.data.prepare.prepare import prepare
from rec_dist.data.prepare.windows import stitch
from rec_dist.data.sources.benchmarks import find_benchmark
from rec_dist.errors import UserError

ALL: dict[str, Any] = {"split": "user_ratio", "valid_fraction": 0.0, "test_fraction": 0.0, "merge_equal_titles": False}


def prepared(folder: Path, target: Path, **changes: Any) -> tuple[PreparedData, Manifest]:
    settings: dict[str, Any] = {**ALL, "format": "minionerec", "train_files": ["train", "valid"], **changes}
    manifest = prepare(DataConfig(source=str(folder), path=str(target), **settings))
    return PreparedData.open(target, cache=str(target.parent / "cache")), manifest


def rows(data: PreparedData, split: str) -> list[tuple[str, list[int], int]]:
    """(raw user, items, first target) of each row."""
    part = data.split(split)
    return [
        (part.names_of(np.array([row]))[0], part.items_of(row).tolist(), int(part.first_target[row])) for row in range(len(part))
    ]


STITCHED = [
    ("ann", [0, 1, 2, 0], 1),
    ("bob", [2, 3, 4], 1),
    ("ann", [5, 3, 4], 2),  # a sequence of its own: its history is context only
    ("cat", [4, 5], 1),
]


@pytest.mark.parametrize("nested", [True, False])
def test_minionerec_by_hand(tmp_path: Path, nested: bool) -> None:
    data, manifest = prepared(write_minionerec(tmp_path / "source", nested=nested), tmp_path / "data")
    assert rows(data, "train") == STITCHED
    assert data.raw_items == ["10", "11", "12", "13", "14", "15"]
    assert data.titles == ["Blue kettle", "Red kettle", "Spare lid", "Tea & strainer", "Spare lid", "Cup"]
    assert data.train_counts.tolist() == [2, 1, 2, 2, 3, 2]
    assert len(data.split("valid")) == len(data.split("test")) == 0
    counts = {"raw_rows": 7, "stitched_rows": 3, "own_rows": 1, "users": 3, "positives": 12, "items": 6}
    assert manifest.counts == {**counts, "merged_items": 0, "equal_titles": 2}
    assert "1 titles hold HTML entities" in manifest.notes[0]
    assert "3 of 7 rows continue" in manifest.notes[1]
    assert data.split("train").num_targets == 7 == len(TRAIN + VALID), "every row is one target where windows begin at the start"


def test_cold_items_leave_the_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "cold_items", lambda names, fraction: np.isin(names, ["13"]))
    data, _ = prepared(write_minionerec(tmp_path / "source"), tmp_path / "data", cold_items_fraction=0.2)
    assert rows(data, "train") == [
        ("ann", [0, 1, 2, 0], 1),
        ("bob", [2, 4], 1),
        ("ann", [5, 4], 1),  # of the context one item is left
        ("cat", [4, 5], 1),
    ]
    assert data.train_counts.tolist() == [2, 1, 2, 0, 3, 2] and data.held_out.tolist() == [3]


def test_bear_by_hand(tmp_path: Path) -> None:
    data, _ = prepared(write_bear(tmp_path / "source"), tmp_path / "data", format="bear", train_files=["train"])
    assert rows(data, "train") == STITCHED
    assert data.titles[3] == "Tea & strainer"


def test_without_the_train_file_histories_of_the_validation_rows_train_too(tmp_path: Path) -> None:
    folder = write_minionerec(tmp_path / "source", parts=["valid", "test"])
    with pytest.raises(UserError, match=r"data\.train_files: .* has no train file \(it has valid, test\)"):
        prepared(folder, tmp_path / "data", train_files=["train"])
    assert not (tmp_path / "data").exists()
    data, _ = prepared(folder, tmp_path / "data", train_files=["valid"])
    assert rows(data, "train") == [
        ("ann", [1, 2, 0], 1),
        ("bob", [2, 3, 4], 1),
        ("ann", [5, 3, 4], 2),
        ("cat", [4, 5], 1),
    ]


def test_the_order_of_files_is_that_of_time_however_they_are_named(tmp_path: Path) -> None:
    folder = write_minionerec(tmp_path / "source")
    data, _ = prepared(folder, tmp_path / "data", train_files=["valid", "train"])
    assert rows(data, "train") == STITCHED


def windows_of(sequences: dict[str, list[int]], longest: int) -> list[Window]:
    """All windows of all users, interleaved as in time."""
    found = []
    for end in range(1, max(map(len, sequences.values()))):
        found += [(user, items[max(0, end - longest) : end], items[end]) for user, items in sequences.items() if end < len(items)]
    return found


def test_windows_of_any_sequences_become_these_sequences_again() -> None:
    rng = np.random.default_rng(0)
    for longest in (1, 3, 10):
        # Few items, so that sequences repeat items and whole stretches.
        sequences = {f"u{user}": rng.integers(4, size=rng.integers(2, 30)).tolist() for user in range(40)}
        found = stitch(windows_of(sequences, longest), longest)
        assert dict(zip(found.users, found.items, strict=True)) == sequences
        assert all(found.is_first)
        assert set(found.first_target.tolist()) == {1}


def test_a_lost_row_loses_nothing_else_and_no_target_twice() -> None:
    sequence = list(range(20))
    whole = windows_of({"u": sequence}, 3)
    found = stitch(whole[:8] + whole[9:], 3)
    assert found.items == [sequence[:9], sequence[7:]]
    targets = [item for items, first in zip(found.items, found.first_target.tolist(), strict=True) for item in items[first:]]
    assert Counter(targets) == Counter(target for _, _, target in whole[:8] + whole[9:])
    assert found.is_first == [True, False]


def test_held_out_users_keep_all_their_sequences_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    items = list(TITLES)
    many: list[Window] = []
    for user in range(60):
        for _ in range(2):  # two sequences that do not meet
            picked = rng.choice(items, size=4).tolist()
            many += [(f"u{user}", picked[:2], picked[2]), (f"u{user}", picked[:3], picked[3])]
    folder = write_minionerec(tmp_path / "source", parts=["test"])
    (folder / "train").mkdir()
    (folder / "train" / "Kitchen_5.csv").write_text(minionerec_text(many), encoding="utf-8")
    data, manifest = prepared(folder, tmp_path / "data", train_files=["train"], valid_fraction=0.3)
    trained, held = rows(data, "train"), rows(data, "valid")
    assert not {user for user, *_ in trained} & {user for user, *_ in held}
    assert 0.15 < len({user for user, *_ in held}) / 60 < 0.45
    assert all(first == 2 for *_, first in held), "only targets of rows are asked of a held-out user"
    asked = Counter(user for user, items, first in trained + held for _ in items[max(first, 2) :])
    assert set(asked.values()) == {4}, "every row of the file is one target"
    assert manifest.splits["valid"].targets == 4 * len({user for user, *_ in held})


def test_the_last_rows_are_held_out_and_the_users_stay(tmp_path: Path) -> None:
    """Of the 7 rows of both files the last two validate, and the one before them tests nothing."""
    data, manifest = prepared(
        write_minionerec(tmp_path / "source"),
        tmp_path / "data",
        split="global_temporal",
        valid_fraction=2 / 7,
        test_fraction=1 / 7,
    )
    assert manifest.cuts == {"valid_from": 5, "test_from": 7}
    assert rows(data, "train") == [("ann", [0, 1, 2, 0], 1), ("bob", [2, 3], 1)]
    assert rows(data, "valid") == [("bob", [2, 3, 4], 2), ("ann", [5, 3, 4], 2)]
    assert rows(data, "test") == [("cat", [4, 5], 1)]
    assert data.train_counts.tolist() == [2, 1, 2, 1, 0, 0]


def test_what_lies_before_the_first_row_of_a_late_user_trains(tmp_path: Path) -> None:
    late: list[Window] = [("ann", [10], 11), ("bob", [12, 13, 14], 15), ("bob", [12, 13, 14, 15], 10)]
    folder = write_minionerec(tmp_path / "source", parts=["test"])
    (folder / "train").mkdir()
    (folder / "train" / "Kitchen_5.csv").write_text(minionerec_text(late), encoding="utf-8")
    data, _ = prepared(folder, tmp_path / "data", train_files=["train"], split="global_temporal", valid_fraction=2 / 3)
    assert rows(data, "train") == [("ann", [0, 1], 1), ("bob", [2, 3, 4], 1)]
    assert rows(data, "valid") == [("bob", [2, 3, 4, 5, 0], 3)]
    assert len(data.split("test")) == 0


def test_equal_titles_merge_by_default(tmp_path: Path) -> None:
    data, manifest = prepared(write_minionerec(tmp_path / "source"), tmp_path / "data", merge_equal_titles=True)
    assert data.raw_items == ["10", "11", "12", "13", "15"]
    assert rows(data, "train")[1] == ("bob", [2, 3, 2], 1)
    assert (manifest.counts["merged_items"], manifest.counts["equal_titles"]) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "leave_one_out"}, ("data.split (leave_one_out)", "data.split=user_ratio", "data.test_fraction=0")),
        ({"min_user_interactions": 3}, ("data.min_user_interactions", "no effect", "minionerec")),
        ({"columns": {"user": "u"}}, ("data.columns", "no effect")),
        ({"category": "Garden"}, ("holds no file of titles of data.category=Garden",)),
        (
            {"format": "csv", "category": "Kitchen", "train_files": ["train"]},
            ("data.category", "no effect", "minionerec and bear"),
        ),
        ({"format": "csv"}, ("data.train_files", "no effect")),
        ({"valid_fraction": 0.0001}, ("leaves the valid split without a target",)),
    ],
)
def test_what_cannot_take_effect_is_refused(tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    folder = write_minionerec(tmp_path / "source")
    with pytest.raises(UserError) as caught:
        prepared(folder, tmp_path / "data", **changes)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"], "nothing is left behind"


def test_a_temporal_split_needs_a_test_split(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\na,x,1\n")
    with pytest.raises(UserError, match=r"data\.test_fraction=0 .*user_ratio"):
        prepare(DataConfig(source=str(tmp_path / "log.csv"), path=str(tmp_path / "data"), test_fraction=0.0))


def test_users_of_any_source_can_be_held_out_without_a_test_split(tmp_path: Path) -> None:
    lines = [f"u{user},i{(user + step) % 9},{step}" for user in range(40) for step in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp", *lines]) + "\n")
    config = DataConfig(
        source=str(tmp_path / "log.csv"), path=str(tmp_path / "data"), split="user_ratio", valid_fraction=0.3, test_fraction=0.0
    )
    splits = prepare(config).splits
    assert splits["test"].rows == 0 < splits["valid"].rows
    assert splits["train"].rows + splits["valid"].rows == 40


def test_several_categories_are_named(tmp_path: Path) -> None:
    folder = write_bear(tmp_path)
    (folder / "Garden.train.csv").write_text(bear_text(TRAIN))
    with pytest.raises(UserError, match=r"2 train files \(Garden\.train\.csv, Kitchen\.train\.csv\); set data\.category"):
        find_benchmark(folder, "bear", None)
    assert find_benchmark(folder, "bear", "Kitchen").parts["train"].name == "Kitchen.train.csv"
    with pytest.raises(UserError, match=r"is not a folder"):
        find_benchmark(folder / "Garden.train.csv", "bear", None)


def test_a_category_may_be_a_folder(tmp_path: Path) -> None:
    for name in ("Kitchen", "Garden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(bear_text(TRAIN))
        (tmp_path / name / "id2name4Rec.json").write_text("{}")
    found = find_benchmark(tmp_path, "bear", "Garden")
    assert (found.items, found.parts) == (
        tmp_path / "Garden" / "id2name4Rec.json",
        {"train": tmp_path / "Garden" / "train.csv"},
    )


def test_bad_rows_are_named_by_file_and_line(tmp_path: Path) -> None:
    folder = write_minionerec(tmp_path / "source")
    path = folder / "valid" / "Kitchen_5_2016-10-2018-11.csv"
    bad = [
        'eve,"[]","x","[10, 99]",11,"[]",x',
        'eve,"[]","x","[10",11,"[]",x',
        'eve,"[]","x","[]",11,"[]",x',
        "eve,[],x,[10],,[],x",
    ]
    path.write_text(path.read_text() + "\n".join(bad) + "\n")
    with pytest.raises(UserError) as caught:
        prepared(folder, tmp_path / "data")
    message = str(caught.value)
    assert message.startswith("data.max_bad_rows (0) is exceeded: 4 rows")
    assert f"{path}:6: item is not in Kitchen_5_2016-10-2018-11.txt ('99')" in message
    assert f"{path}:7: history_item_id is not a list of items" in message
    assert f"{path}:8: no item before the target" in message
    assert f"{path}:9: item_id is neither" in message
    data, manifest = prepared(folder, tmp_path / "data", max_bad_rows=4)
    assert rows(data, "train") == STITCHED
    assert sum(manifest.bad_rows.values()) == 4


def test_titles_that_are_missing_or_no_titles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_bear(tmp_path / "source")
    names = folder / "Kitchen.id2name4Rec.json"
    names.write_text(json.dumps({str(item): "" if item == 15 else title for item, title in TITLES.items()}))
    with caplog.at_level(logging.INFO):
        data, _ = prepared(folder, tmp_path / "data", format="bear", train_files=["train"])
    assert data.titles[5] == "15"
    assert "1 items have no title" in caplog.text
    names.write_text(json.dumps({"10": 3}))
    with pytest.raises(UserError, match=r"is not one JSON object of item -> title"):
        prepared(folder, tmp_path / "other", format="bear", train_files=["train"])


def test_a_packed_copy_of_the_same_files_gives_the_same_sequences(tmp_path: Path) -> None:
    plain = write_minionerec(tmp_path / "plain", nested=True)
    packed = write_minionerec(tmp_path / "packed", nested=False)
    one, _ = prepared(plain, tmp_path / "one")
    two, _ = prepared(packed, tmp_path / "two")
    assert rows(one, "train") == rows(two, "train")
    (packed / "Kitchen.valid.csv.gz").write_bytes(gzip.compress(b"user_id,item_id\n"))
    with pytest.raises(UserError, match=r"valid\.csv\.gz:1: the columns are user_id, item_id; they must hold"):
        prepared(packed, tmp_path / "three")


def test_test_rows_never_train(tmp_path: Path) -> None:
    data, manifest = prepared(write_minionerec(tmp_path / "source"), tmp_path / "data")
    assert "dan" not in {user for user, *_ in rows(data, "train")}
    assert [entry.name for entry in manifest.sources] == [
        "Kitchen_5_2016-10-2018-11.txt",
        "Kitchen_5_2016-10-2018-11.csv",
        "Kitchen_5_2016-10-2018-11.csv",
    ]
    assert {user for user, *_ in TEST} == {"ann", "dan"}
