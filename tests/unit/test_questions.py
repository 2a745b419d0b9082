"""evaluate.questions: files of several layouts, users with several rows, and metrics computed by hand."""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_files import write_bear, write_minionerec
from prepared_rows import Row, write_prepared

from rec_dist.commands.evaluate import evaluate, table_of
from rec_dist.commands.prepare import prepare
from rec_dist.config.load import load_config
from rec_dist.data.artifacts.predictions import Predictions
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.questions import build_question_examples, find_questions
from rec_dist.report.compare import compare
from rec_dist.runtime.run_directory import RunDirectory

ROWS: list[dict[str, Any]] = [
    {"user_id": "ann", "history": ["i0", "i3"], "target": "i2"},
    {"user_id": "bob", "history": ["i1"], "target": "i1"},
    {"user_id": "ann", "history": ["i3", "i2", "i0"], "target": "i4"},
]


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    """Items i0..i5, of which train has 0, 1, 2, 3, 4 and 5."""
    rows = [Row(0, [i for i in range(6) for _ in range(i)])]
    return write_prepared(tmp_path / "data", {"train": rows}, [f"title {item}" for item in range(6)])


def examples(data: PreparedData, path: Path, **changes: Any) -> list[EvalExample]:
    settings: dict[str, Any] = {"num_candidates": "all", "max_users": None, "seed": 0, "exclude_seen": False}
    return build_question_examples(data, path, **{**settings, **changes})


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    cells = lambda row: [json.dumps(v).replace('"', '""') if isinstance(v, list) else v for v in row.values()]
    lines = [",".join(f'"{cell}"' for cell in cells(row)) for row in rows]
    path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n", encoding="utf-8")


def as_packed_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    as_csv(path, rows)
    path.write_bytes(gzip.compress(path.read_bytes()))


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "q.csv": as_csv,
    "q.csv.gz": as_packed_csv,
    "q.jsonl": as_jsonl,
    "q.parquet": as_parquet,
}


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_format_asks_the_same(data: PreparedData, tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    found = examples(data, tmp_path / name)
    assert [(e.user_id, e.position, e.target, e.history.tolist()) for e in found] == [
        (0, 0, 2, [0, 3]),
        (1, 1, 1, [1]),
        (0, 2, 4, [3, 2, 0]),
    ]
    assert all(e.candidates.tolist() == [0, 1, 2, 3, 4, 5] for e in found)
    assert not any(e.given for e in found)


def test_seen_items_leave_the_candidates_but_never_the_target(data: PreparedData, tmp_path: Path) -> None:
    as_jsonl(tmp_path / "q.jsonl", ROWS)
    found = examples(data, tmp_path / "q.jsonl", exclude_seen=True)
    assert [e.candidates.tolist() for e in found] == [[1, 2, 4, 5], [0, 1, 2, 3, 4, 5], [1, 4, 5]]


def test_drawn_candidates_differ_between_the_rows_of_a_user(data: PreparedData, tmp_path: Path) -> None:
    row = {"user_id": "ann", "history": ["i0"], "target": "i1"}
    as_jsonl(tmp_path / "q.jsonl", [row] * 20)
    found = [tuple(e.candidates.tolist()) for e in examples(data, tmp_path / "q.jsonl", num_candidates=3, exclude_seen=True)]
    assert len(set(found)) > 5
    assert all(len(set(candidates)) == 3 and 1 in candidates and 0 not in candidates for candidates in found)
    kept = [set(e.candidates.tolist()) for e in examples(data, tmp_path / "q.jsonl", num_candidates=3, exclude_seen=False)]
    assert any(0 in candidates for candidates in kept), "without exclude_seen an item of the history may be drawn"


def test_given_candidates_are_ranked_as_they_stand(data: PreparedData, tmp_path: Path) -> None:
    rows = [{**row, "candidates": [row["target"], "i5", "i0"]} for row in ROWS]
    for name, write in WRITERS.items():
        write(tmp_path / name, rows)
        found = examples(data, tmp_path / name, num_candidates=2, exclude_seen=True)
        assert [e.candidates.tolist() for e in found] == [[2, 5, 0], [1, 5, 0], [4, 5, 0]]
        assert all(e.given for e in found)


def test_a_draw_of_users_keeps_all_their_rows(data: PreparedData, tmp_path: Path) -> None:
    rows = [{"user_id": f"u{n % 10}", "history": ["i0"], "target": "i1"} for n in range(30)]
    as_jsonl(tmp_path / "q.jsonl", rows)
    found = examples(data, tmp_path / "q.jsonl", max_users=4)
    assert len(found) == 12
    assert len({e.user_id for e in found}) == 4
    assert all(e.position % 10 == e.user_id for e in found)
    fewer = {e.user_id for e in examples(data, tmp_path / "q.jsonl", max_users=3)}
    assert fewer < {e.user_id for e in found}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ROWS[0], {**ROWS[1], "history": ["i1", "z9"]}], ("q.csv:3: the history has the item 'z9'", "does not hold;")),
        ([{**ROWS[0], "target": "z1"}, {**ROWS[1], "target": "z2"}], ("q.csv:2: the target has the item 'z1'", "1 more names")),
        ([{**ROWS[0], "history": []}], ("q.csv:2: no item before the target",)),
        ([{**ROWS[0], "history": "i0"}], ("q.csv:2: history is not a list of items",)),
        ([{**ROWS[0], "history": [1.5]}], ("q.csv:2: history is neither a text nor a whole number",)),
        ([{**ROWS[0], "user_id": ""}], ("q.csv:2: user_id is neither",)),
        ([{**ROWS[0], "candidates": ["i5"]}], ("q.csv:2: the target 'i2' is not among its candidates",)),
        ([{**ROWS[0], "candidates": ["i2"]}], ("q.csv:2: the target is the only candidate",)),
        ([{**ROWS[0], "candidates": ["i2", "i5", "i5"]}], ("q.csv:2: an item stands twice among the candidates",)),
        ([{**ROWS[0], "candidates": ["i2", "zz"]}], ("q.csv:2: the list of candidates has the item 'zz'",)),
        ([{**ROWS[0], "candidates": ["i2", "i5"]}, {**ROWS[1], "candidates": ""}], ("q.csv:3: the row has no candidates",)),
        ([{"user": "ann", "items": ["i0"]}], ("q.csv:1: the columns are user, items", "user_id, history, target")),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    data: PreparedData, tmp_path: Path, rows: list[dict[str, Any]], words: tuple[str, ...]
) -> None:
    as_csv(tmp_path / "q.csv", rows)
    with pytest.raises(UserError) as caught:
        examples(data, tmp_path / "q.csv")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_questions(data: PreparedData, tmp_path: Path) -> None:
    for name, text in (("q.jsonl", "[1]\n"), ("empty.csv", "user_id,history,target\n"), ("q.txt", "a\n"), ("q.parquet", "PAR1")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            examples(data, tmp_path / name)
    for place in (tmp_path / "missing.csv", tmp_path):
        with pytest.raises(UserError, match=r"evaluate\.questions"):
            find_questions(place, "csv", None)


def test_a_packed_copy_is_the_same_file(tmp_path: Path) -> None:
    as_csv(tmp_path / "a.csv", ROWS)
    as_packed_csv(tmp_path / "b.csv.gz", ROWS)
    as_csv(tmp_path / "c.csv", ROWS[:2])
    one, two, three = (find_questions(tmp_path / name, "auto", None).fingerprint for name in ("a.csv", "b.csv.gz", "c.csv"))
    assert one == two != three


# The whole road on a benchmark's folder. Popularity counts 10..15 in the training rows as 2, 1, 2, 2, 3, 2
# (tests/unit/data/test_benchmarks.py), so the ranks of the three test rows, ties against the target, are:
#   ann, history 12 10, target 13 (2): 10, 12, 14, 15 score 2 or more -> 5; without 12 and 10 -> 3
#   dan, history 10,    target 11 (1): all others do                  -> 6; without 10        -> 5
#   ann, history 10 13, target 14 (3): none does                      -> 1; without 10 and 13 -> 1
KEPT_RANKS, REMOVED_RANKS = [5, 6, 1], [3, 5, 1]


def config_of(tmp_path: Path, folder: Path, **data: Any) -> dict[str, Any]:
    section = {"source": str(folder), "path": str(tmp_path / "prepared"), "cache_dir": str(tmp_path / "cache"), **data}
    section |= {"split": "user_ratio", "valid_fraction": 0.0, "test_fraction": 0.0, "merge_equal_titles": False}
    evaluation = {"ranker": "popularity", "questions": str(folder), "num_candidates": "all", "exclude_seen": False}
    return {"data": section, "train": {"run_dir": str(tmp_path / "run")}, "evaluate": evaluation}


@pytest.fixture(params=["minionerec", "bear"])
def benchmark(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    if request.param == "minionerec":
        folder, files = write_minionerec(tmp_path / "source"), ["train", "valid"]
    else:
        folder, files = write_bear(tmp_path / "source"), ["train"]
    config = config_of(tmp_path, folder, format=request.param, train_files=files, category="Kitchen")
    prepare(load_config(config))
    return config


def ask(config: dict[str, Any], folder: Path, **evaluation: Any) -> dict[str, Any]:
    config = {**config, "evaluate": {**config["evaluate"], "output_dir": str(folder), **evaluation}}
    return evaluate(config, progress=False)


def test_a_benchmark_s_test_rows_by_hand(benchmark: dict[str, Any], tmp_path: Path) -> None:
    row = ask(benchmark, tmp_path / "kept")
    predictions = Predictions.read(tmp_path / "kept" / "predictions.arrow")
    assert predictions.ranks.tolist() == KEPT_RANKS
    assert predictions.user_ids.tolist() == [0, 1, 0]
    assert predictions.positions.tolist() == [0, 1, 2]
    assert row["metrics"]["ndcg@10"]["value"] == pytest.approx((1 / math.log2(6) + 1 / math.log2(7) + 1) / 3)
    hit = row["metrics"]["hr@1"]
    assert (hit["value"], hit["n"], hit["questions"]) == (pytest.approx(1 / 3), 2, 3)
    assert (hit["low"], hit["high"]) == (0.0, 0.5), "resamples of users: dan twice 0, ann twice 1/2, both 1/3"
    assert (row["num_candidates"], row["exclude_seen"]) == ("all", False)
    assert "split" not in row
    assert row["questions"].endswith((".csv", ".csv.gz"))
    assert "n = 2 users, 3 questions" in table_of(row)
    assert "seen items kept" in table_of(row)
    removed = ask(benchmark, tmp_path / "removed", exclude_seen=True)
    assert Predictions.read(tmp_path / "removed" / "predictions.arrow").ranks.tolist() == REMOVED_RANKS
    assert removed["exclude_seen"] is True
    assert "seen items" not in table_of(removed)


def test_what_was_asked_decides_whether_an_evaluation_is_kept(benchmark: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "results"

    def measured() -> int:
        return sum(row["event"] == "evaluation" for row in RunDirectory(folder).rows())

    source = find_questions(tmp_path / "source", benchmark["data"]["format"], "Kitchen").path
    ask(benchmark, folder)
    begun = measured()
    ask(benchmark, folder)
    copy = tmp_path / f"copy{''.join(source.suffixes)[-7:]}" if source.suffix == ".gz" else tmp_path / "copy.csv"
    copy.write_bytes(source.read_bytes())
    ask(benchmark, folder, questions=str(copy))
    assert measured() == begun, "the same questions in another place"
    ask(benchmark, folder, exclude_seen=True)
    assert measured() == begun + 1
    text = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    (tmp_path / "fewer.csv").write_bytes(b"\n".join(text.split(b"\n")[:3]) + b"\n")
    ask(benchmark, folder, questions=str(tmp_path / "fewer.csv"), exclude_seen=True)
    assert measured() == begun + 2


def test_runs_under_two_protocols_are_compared_within_each(benchmark: dict[str, Any], tmp_path: Path) -> None:
    folders = {name: [tmp_path / name] for name in ("a, kept", "b, kept", "a, removed")}
    for name, (folder,) in folders.items():
        ask(benchmark, folder, exclude_seen="removed" in name)
    compared = compare(folders, [["a, kept", "b, kept"]], ["hr@1", "ndcg@10"])
    assert [row.seen for row in compared.rows] == ["kept", "kept", "removed"]
    assert compared.summary.startswith("3 questions of 2 users of Kitchen")
    assert compared.summary.endswith("all items ranked.")
    assert compared.differences[0].interval == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 2, "questions": 3}
    with pytest.raises(UserError, match=r"differ in evaluate\.exclude_seen"):
        compare(folders, [["a, kept", "a, removed"]], ["hr@1"])
    ask(benchmark, tmp_path / "drawn", num_candidates=3, exclude_seen=True)
    with pytest.raises(UserError, match="different users, targets or candidates"):
        compare({**folders, "drawn": [tmp_path / "drawn"]}, [], ["hr@1"])


def test_questions_with_other_histories_are_not_compared(benchmark: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"user_id": "u", "history": ["10"], "target": "12"}, {"user_id": "u", "history": ["11"], "target": "12"}]
    for place, row in enumerate(rows):
        as_jsonl(tmp_path / f"{place}.jsonl", [row])
        ask(benchmark, tmp_path / f"of-{place}", questions=str(tmp_path / f"{place}.jsonl"))
    with pytest.raises(UserError, match="different users, targets or candidates"):
        compare({"0": [tmp_path / "of-0"], "1": [tmp_path / "of-1"]}, [], ["hr@1"])


def test_merged_items_have_a_way_out(tmp_path: Path) -> None:
    folder = write_minionerec(tmp_path / "source")
    config = config_of(tmp_path, folder, format="minionerec", train_files=["train", "valid"])
    config["data"]["merge_equal_titles"] = True
    prepare(load_config(config))
    with pytest.raises(UserError, match=r"csv:4: the target has the item '14'.*data\.merge_equal_titles=false"):
        ask(config, tmp_path / "results")


def test_keys_without_effect_on_questions_are_refused(benchmark: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.targets=all has no effect"):
        ask(benchmark, tmp_path / "results", targets="all")
    with pytest.raises(UserError, match=r"evaluate\.negatives=low_rated has no effect"):
        ask(benchmark, tmp_path / "results", negatives="low_rated")


def test_given_candidates_in_the_row(benchmark: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"user_id": "u", "history": ["10"], "target": "12", "candidates": ["12", "11"]},
        {"user_id": "v", "history": ["10"], "target": "12", "candidates": ["12", "14", "15"]},
    ]
    as_jsonl(tmp_path / "q.jsonl", rows)
    row = ask(benchmark, tmp_path / "results", questions=str(tmp_path / "q.jsonl"))
    assert Predictions.read(tmp_path / "results" / "predictions.arrow").ranks.tolist() == [1, 3]
    assert (row["num_candidates"], row["exclude_seen"]) == ("given", None)
    assert compare({"a": [tmp_path / "results"]}, [], ["hr@1"]).summary == "2 users of q.jsonl, candidates from the file."
    listed = {**benchmark, "prompt": {"candidates": "listed", "num_candidates": 3}}
    with pytest.raises(UserError, match=r"question 0 has 2 candidates, and prompt\.num_candidates \(3\)"):
        ask(listed, tmp_path / "listed", questions=str(tmp_path / "q.jsonl"))


def test_every_target_of_a_split_is_asked_on_demand(tmp_path: Path) -> None:
    rows = [Row(0, [0, 1, 2, 3], first_target=2), Row(4, [3, 1])]
    write_prepared(tmp_path / "data", {"valid": rows, "train": rows}, [f"t{item}" for item in range(5)])
    config = {
        "data": {"path": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")},
        "train": {"run_dir": str(tmp_path / "run")},
        "evaluate": {"ranker": "popularity", "split": "valid", "num_candidates": "all", "targets": "all"},
    }
    row = evaluate(config, progress=False)
    found = Predictions.read(tmp_path / "run-popularity" / "predictions.arrow")
    assert list(zip(found.user_ids.tolist(), found.positions.tolist(), found.targets.tolist(), strict=True)) == [
        (0, 2, 2),
        (0, 3, 3),
        (4, 1, 1),
    ]
    assert [candidates.tolist() for candidates in found.candidates] == [[2, 3, 4], [3, 4], [0, 1, 2, 4]]
    # train counts 1 2 1 2 0: 2 loses to 3; 3 leads 4; 1 leads 0, 2, 4
    assert found.ranks.tolist() == [2, 1, 1]
    assert (row["metrics"]["mrr"]["n"], row["metrics"]["mrr"]["questions"]) == (2, 3)
    assert np.isclose(row["metrics"]["mrr"]["value"], (0.5 + 1 + 1) / 3)


def test_repeats_of_a_row_are_averaged_and_paired_seed_by_seed(benchmark: dict[str, Any], tmp_path: Path) -> None:
    """Popularity answers all; its ranks are then replaced, so that the seeds of a row differ."""
    folders: dict[str, list[Path]] = {"a": [], "b": [], "one": []}
    for name, ranks in (("a", [1, 1, 1]), ("a", [2, 2, 1]), ("b", [2, 1, 2]), ("b", [2, 2, 2]), ("one", [1, 2, 2])):
        folder = tmp_path / f"{name}{len(folders[name])}"
        ask(benchmark, folder)
        found = Predictions.read(folder / "predictions.arrow")
        replace(found, ranks=np.asarray(ranks, dtype=np.int32)).write(folder / "predictions.arrow")
        folders[name].append(folder)
    compared = compare(folders, [["a", "b"], ["a", "one"]], ["hr@1"])
    rows = {row.name: row.metrics["hr@1"] for row in compared.rows}
    assert (rows["a"]["value"], rows["a"]["repeats"]) == (pytest.approx(4 / 6), 2)
    assert (rows["b"]["value"], rows["one"]["value"]) == (pytest.approx(1 / 6), pytest.approx(1 / 3))
    assert "repeats" not in rows["one"]
    assert [d.interval["value"] for d in compared.differences] == [pytest.approx(3 / 6), pytest.approx(2 / 6)]
    folders["a"].append(folders["a"][0])
    with pytest.raises(UserError, match="a has 3 stages and b 2"):
        compare(folders, [["a", "b"]], ["hr@1"])
