"""prepare: exact rows of a data set small enough to check by hand, and properties that hold for any data set."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.dataset.verify import verify
from rec_dist.data.prepare import prepare as prepare_module
from rec_dist.data.prepare import splits
from rec_dist.data.prepare.positives import Rows, k_core
from rec_dist.data.prepare.prepare import prepare
from rec_dist.errors import UserError
from rec_dist.runtime.messages import messages_to
from rec_dist.storage.files import lock

# user, item, rating, time. The rows are not in time order; ann has a tie at 5 and rates d twice; bob's e is an explicit negative.
TINY = """user,item,rating,timestamp
ann,a,5,1
ann,c,4,5
ann,b,4,5
ann,e,1,2
bob,b,5,4
bob,a,5,3
ann,d,5,7
ann,d,1,9
bob,e,2,6
bob,c,5,8
bob,d,4,10
ann,e2,2,8
cat,a,4,9
cat,b,5,10
dan,e,5,3
dan,a,4,4
"""


def config(folder: Path, **changes: object) -> DataConfig:
    base = {"source": str(folder / "tiny.csv"), "path": str(folder / "out"), "split": "leave_one_out", "min_rating": 4.0}
    return DataConfig(**{**base, "min_user_interactions": 1, **changes})


def run(folder: Path, text: str = TINY, **changes: object) -> tuple[PreparedData, list[str]]:
    (folder / "tiny.csv").write_text(text)
    said: list[str] = []
    with messages_to(said.append):
        prepare(config(folder, **changes))
    return PreparedData.open(folder / "out"), said


def rows(data: PreparedData, name: str) -> dict[str, tuple[str, int, str]]:
    """raw user -> (titles in order, first_target, titles of explicit negatives)."""
    split = data.split(name)
    spell = lambda items: "".join(data.titles[item] for item in items)
    return {
        split.shards.raw_user(row): (
            spell(split.items_of(row)),
            int(split.first_target[row]),
            spell(split.explicit_negatives_of(row)),
        )
        for row in range(len(split))
    }


def test_cold_items_are_in_the_test_split_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "cold_items", lambda names, fraction: np.isin(names, ["b", "e"]))
    data, said = run(tmp_path, split="leave_one_out", cold_items_fraction=0.3)
    assert rows(data, "train") == {"ann": ("ac", 1, "")}  # of bob's a and b only a is left, which has nothing before it
    assert rows(data, "valid") == {"bob": ("ac", 1, "")}  # ann's target is b
    assert rows(data, "test")["ann"] == ("acbd", 3, "e") and rows(data, "test")["dan"] == ("ea", 1, "")
    assert dict(zip(data.titles, data.train_counts.tolist(), strict=True)) == {"a": 1, "c": 1, "b": 0, "e": 0, "d": 0}
    assert any("2 of 5 are in no history and no target of the train and valid splits" in line for line in said)
    assert [data.titles[item] for item in data.held_out] == ["b", "e", "d"]  # training never met d either


def test_more_items_are_cold_for_a_larger_fraction_and_a_name_decides():
    names = [f"i{number}" for number in range(1000)]
    few, many = splits.cold_items(names, 0.1), splits.cold_items(names, 0.4)
    assert 60 < few.sum() < 140 and 330 < many.sum() < 470 and not (few & ~many).any()
    assert splits.cold_items(names[:50], 0.4).tolist() == many[:50].tolist()


def test_leave_one_out_rows(tmp_path):
    data, said = run(tmp_path, split="leave_one_out")
    assert rows(data, "train") == {"ann": ("ac", 1, "e"), "bob": ("ba"[::-1], 1, "e")}
    assert rows(data, "valid") == {"ann": ("acb", 2, "e"), "bob": ("abc", 2, "e")}
    assert rows(data, "test") == {
        "ann": ("acbd", 3, "e"),
        "bob": ("abcd", 3, "e"),
        "cat": ("ab", 1, ""),
        "dan": ("ea", 1, ""),
    }
    assert any("leaks" in line for line in said)
    assert dict(zip(data.titles, data.train_counts.tolist(), strict=True)) == {"a": 2, "b": 1, "c": 1, "d": 0, "e": 0}


def test_global_temporal_rows(tmp_path):
    # 12 positives, times 1 3 3 4 4 5 5 7 8 9 10 10: validation from the 8th (7), test from the 10th (9).
    data, said = run(tmp_path, split="global_temporal", valid_fraction=2 / 12, test_fraction=3 / 12)
    assert data.manifest.cuts == {"valid_from": 7, "test_from": 9}
    assert rows(data, "train") == {"ann": ("acb", 1, "e"), "bob": ("ab", 1, "e"), "dan": ("ea", 1, "")}
    assert rows(data, "valid") == {"ann": ("acbd", 3, "e"), "bob": ("abc", 2, "e")}
    assert rows(data, "test") == {"bob": ("abcd", 3, "e"), "cat": ("ab", 1, "")}
    assert not any("leaks" in line for line in said)
    assert dict(zip(data.titles, data.train_counts.tolist(), strict=True)) == {"a": 3, "b": 2, "c": 1, "d": 0, "e": 1}


def test_user_ratio_rows(tmp_path):
    text = "user,item,rating,timestamp\n" + "".join(f"u{u},i{i},{1 if i == 1 else 5},{i}\n" for u in range(60) for i in range(4))
    text += "u0,i1,5,-1\n"  # keeps i1 in the catalogue
    data, _ = run(tmp_path, text, split="user_ratio", valid_fraction=0.2, test_fraction=0.2)
    parts = {name: rows(data, name) for name in ("train", "valid", "test")}
    assert sorted(user for part in parts.values() for user in part) == sorted(f"u{u}" for u in range(60))
    for part in parts.values():
        part.pop("u0", None)
    assert set(parts["train"].values()) == {("i0i2i3", 1, "i1")}
    assert set(parts["valid"].values()) == set(parts["test"].values()) == {("i0i2i3", 2, "")}
    assert 2 <= len(parts["valid"]) <= 24
    assert 2 <= len(parts["test"]) <= 24


def test_an_explicit_negative_outside_the_catalogue_is_dropped(tmp_path):
    data, _ = run(tmp_path, split="leave_one_out")
    assert "e2" not in data.titles
    assert data.manifest.counts["explicit_negatives"] == 2


def test_counts_and_ties_are_reported(tmp_path):
    data, said = run(tmp_path, split="leave_one_out")
    counts = data.manifest.counts
    assert (counts["raw_rows"], counts["repeated_rows"], counts["positives"], counts["users"]) == (16, 1, 12, 4)
    assert counts["ties"] == 1
    assert data.manifest.tie_share == pytest.approx(1 / 8)
    assert any(line.startswith("12.5%") for line in said)


def test_ties_stay_in_file_order(tmp_path):
    text = "user,item,timestamp\n" + "".join(f"u,{item},7\n" for item in "qwertyu")
    data, _ = run(tmp_path, text, split="leave_one_out", min_rating=None)
    assert rows(data, "test")["u"][0] == "qwertyu"


def test_a_repeat_keeps_the_first_in_time(tmp_path):
    text = "user,item,rating,timestamp\nu,a,5,30\nu,a,1,10\nu,b,5,20\nu,c,5,40\nu,d,5,50\nu,e,5,60\nv,a,5,1\n"
    data, _ = run(tmp_path, text, split="leave_one_out")
    assert rows(data, "test")["u"][0] == "bcde", "a was an explicit negative when it was first rated"


def test_k_core_goes_on_until_stable(tmp_path):
    # Item 3 has one positive and is dropped; then user 2 has one left and is dropped; then item 2 has one left and is dropped.
    user, item = np.array([0, 0, 1, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 2, 3, 2])
    core = k_core(Rows(user, item, np.arange(7), None, np.ones(7, dtype=bool)), 2, 2)
    assert list(zip(core.user.tolist(), core.item.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_few_shot_keeps_evaluation_and_nests(tmp_path):
    text = "user,item,timestamp\n" + "".join(f"u{u},i{i},{i}\n" for u in range(30) for i in range(5))
    kept = {}
    for count in (4, 9):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        data, _ = run(tmp_path, text, split="leave_one_out", min_rating=None, max_train_users=count)
        kept[count] = set(rows(data, "train"))
        assert len(kept[count]) == count
        assert len(data.split("test")) == 30
        assert data.train_counts.sum() == 3 * count
    assert kept[4] < kept[9]


def test_shards_concatenate_to_the_same_split(tmp_path):
    seen = []
    for shards in (1, 3, 7):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        data, _ = run(tmp_path, split="leave_one_out", num_shards=shards)
        assert len(list((tmp_path / "out").glob("test-*.arrow"))) == shards
        test = data.split("test")
        rows = range(len(test))
        items = test.take(np.arange(len(test)), np.diff(test.offsets))
        explicit_negatives = [test.explicit_negatives_of(row).tolist() for row in rows]
        assert items.tolist() == [item for row in rows for item in test.items_of(row).tolist()]
        seen.append(
            (
                test.user_ids.tolist(),
                test.offsets.tolist(),
                items.tolist(),
                explicit_negatives,
                [test.shards.raw_user(r) for r in rows],
            )
        )
        assert (test.user_ids.dtype, test.offsets.dtype, items.dtype) == (np.int64, np.int64, np.int32)
        assert not test.items_of(0).flags.writeable
    assert seen[0] == seen[1] == seen[2]


def test_preparing_again_keeps_what_is_there(tmp_path):
    data, _ = run(tmp_path, split="leave_one_out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    _, said = run(tmp_path, split="leave_one_out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert "kept" in said[-1]
    with pytest.raises(UserError, match=r"data.path \(.*out\) holds a data set of other settings or files"):
        run(tmp_path, split="global_temporal")
    with pytest.raises(UserError, match=r"other settings or files"):
        run(tmp_path, TINY + "eve,a,5,1\n", split="leave_one_out")
    assert Manifest.load(tmp_path / "out") == data.manifest


def test_two_runs_write_the_same_bytes(tmp_path):
    (tmp_path / "tiny.csv").write_text(TINY)
    for name in ("out", "out2"):
        prepare(config(tmp_path, path=str(tmp_path / name)))
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "out2" / path.name).read_bytes(), path.name


def test_an_interrupted_prepare_leaves_nothing(tmp_path, monkeypatch):
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "publish", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.csv"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"data.path \(.*\) exists and is not a prepared data set"):
        run(tmp_path)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


def test_a_damaged_data_set_is_not_kept(tmp_path):
    run(tmp_path)
    next((tmp_path / "out").glob("train-*")).unlink()
    with pytest.raises(UserError, match=r"is damaged: .*is missing"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("user,item,rating,timestamp\n", {}, "holds no readable row"),
        ("user,item,timestamp\na,x,1\n", {}, r"data.min_rating \(4.0\) needs ratings"),
        ("user,item,rating\na,x,5\n", {"split": "global_temporal"}, "global_temporal needs timestamps"),
        ("user,item,rating,timestamp\na,x,1,1\n", {}, r"none of 0 positives is left after data.min_rating \(4.0\)"),
        ("user,item,rating,timestamp\na,x,5,1\na,y,5,1\n", {}, "leaves the train split without a target"),
        ("user,item,rating,timestamp,title\na,x,5,1,\na,y,5,1,Y\n", {}, r"item has no title \('x'\)"),
        (TINY, {"split": "user_ratio", "valid_fraction": 0.5, "test_fraction": 0.5}, r"data.valid_fraction \(0.5\)"),
        (
            TINY,
            {"source": "/no/such/folder"},
            r"data.source \(/no/such/folder\) is neither an existing file .* \(ml-100k, ml-1m, book-crossing\)",
        ),
    ],
)
def test_mistakes_are_named_and_leave_nothing(text, changes, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        run(tmp_path, text, **changes)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.csv"]


def test_no_timestamps_means_file_order(tmp_path):
    data, said = run(tmp_path, "user,item\nu,c\nu,a\nv,x\nu,b\nu,d\n", split="leave_one_out", min_rating=None)
    assert rows(data, "test")["u"][0] == "cabd"
    assert any("row numbers" in line for line in said)


def test_without_validation_share_the_split_is_empty(tmp_path):
    data, _ = run(tmp_path, split="global_temporal", valid_fraction=0.0, test_fraction=0.25)
    assert len(data.split("valid")) == 0
    assert verify(tmp_path / "out") == []


# Up to 12 users, 8 items, few distinct times, so that ties and cold users are common.
RAW = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 7), st.integers(1, 5), st.integers(0, 15)), min_size=30, max_size=150)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RAW, st.sampled_from(["leave_one_out", "global_temporal", "user_ratio"]))
def test_splits_hold_for_any_data(tmp_path, raw, rule):
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    text = "user,item,rating,timestamp\n" + "".join(f"u{u},i{i},{r},{t}\n" for u, i, r, t in raw)
    try:
        data, _ = run(folder, text, split=rule, min_rating=3.0, valid_fraction=0.2, test_fraction=0.2)
    except UserError as fault:
        if "without a target" in str(fault) or "positives is left" in str(fault):
            return
        raise
    expected, explicit_negatives = expected_sequences(raw)
    when = {(f"u{u}", f"i{i}"): t for u, i, t in first_times(raw)}
    valid_from, test_from = data.manifest.cuts["valid_from"], data.manifest.cuts["test_from"]
    counted: Counter[str] = Counter()
    lasts: dict[str, set[str]] = {"train": set(), "valid": set(), "test": set()}
    for name in lasts:
        split = data.split(name)
        for row in range(len(split)):
            user, items = split.shards.raw_user(row), [data.titles[item] for item in split.items_of(row)]
            first = int(split.first_target[row])
            assert 1 <= first < len(items)
            assert items == expected[user][: len(items)], "a row is a prefix of the user's sequence"
            lasts[name].add(user)
            found = [data.titles[item] for item in split.explicit_negatives_of(row)]
            assert set(found) <= explicit_negatives[user]
            if name == "train":
                counted.update(items)
            if rule == "leave_one_out":
                assert len(items) == len(expected[user]) - {"train": 2, "valid": 1, "test": 0}[name]
                assert first == (1 if name == "train" else len(items) - 1)
            elif rule == "user_ratio":
                assert len(items) == len(expected[user])
                assert first == (1 if name == "train" else len(items) - 1)
                assert name == "train" or not found
            else:
                low = {"train": None, "valid": valid_from, "test": test_from}[name]
                high = {"train": valid_from, "valid": test_from, "test": None}[name]
                times = [when[user, item] for item in items]
                assert high is None or max(times) < high
                assert low is None or all(time >= low for time in times[first:])
                assert low is None or first == 1 or times[first - 1] < low
                assert all(when[user, item] < valid_from for item in found)
    assert {t: c for t, c in zip(data.titles, data.train_counts.tolist(), strict=True) if c} == dict(counted)
    if rule == "user_ratio":
        assert not lasts["train"] & lasts["valid"]
        assert not lasts["train"] & lasts["test"]
        assert not lasts["valid"] & lasts["test"]


def first_times(raw):
    """(user, item, time) of each pair's first row by (time, file order)."""
    seen = {}
    for user, item, _, time in sorted(raw, key=lambda row: row[3]):
        seen.setdefault((user, item), (user, item, time))
    return seen.values()


def expected_sequences(raw):
    """A plain reimplementation of what prepare does before splitting: the positives in order, and all rows, by user."""
    chosen, explicit_negatives, seen = {}, {}, set()
    for user, item, rating, _ in sorted(raw, key=lambda row: row[3]):
        if (user, item) in seen:
            continue
        seen.add((user, item))
        chosen.setdefault(f"u{user}", [])
        explicit_negatives.setdefault(f"u{user}", set())
        if rating >= 3:
            chosen[f"u{user}"].append(f"i{item}")
        else:
            explicit_negatives[f"u{user}"].add(f"i{item}")
    return chosen, explicit_negatives


def test_leave_one_out_of_short_users():
    split = splits.leave_one_out(np.array([1, 2, 3, 4]))
    assert split.train.users.tolist() == [3]
    assert split.valid.users.tolist() == [2, 3]
    assert split.test.users.tolist() == [1, 2, 3]
    assert split.test.first_target.tolist() == [1, 2, 3]


def test_user_hashes_depend_on_the_name_only():
    one, two = splits.hash_names(["a", "b"]), splits.hash_names(["b", "x", "a"])
    assert one.tolist() == [two[2], two[0]]


def test_what_a_killed_attempt_left_is_removed_and_what_another_works_on_is_not(tmp_path):
    for number in (1, 2):
        for suffix in ("tmp", "work"):
            (tmp_path / f".out.{number}.{suffix}").mkdir()
            (tmp_path / f".out.{number}.{suffix}" / "half").touch()
    (tmp_path / ".out.1.lock").touch()  # its process has ended
    at_work = lock(tmp_path / ".out.2.lock")
    run(tmp_path)
    os.close(at_work)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.2.lock", ".out.2.tmp", ".out.2.work", "out", "tiny.csv"]
