"""`rec-dist rank` on a small recommender: every form of users and of output, what is left out, and errors that leave nothing."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_runs import CYCLE, NUM_USERS, finished_run, items_of, raw_item, title
from safetensors.numpy import load_file, save_file

import rec_dist
from rec_dist.cli import main
from rec_dist.config.load import load_saved
from rec_dist.data.artifacts.predictions import Predictions
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.errors import UserError
from rec_dist.evaluation import measure
from rec_dist.evaluation.baselines import Floats
from rec_dist.methods.sequential.saved_model import load_recommender
from rec_dist.methods.sequential.scorer import SequentialScorer
from rec_dist.runtime.arrays import I32

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("ranked"))


def ranked(run: Path, *words: object, capsys: pytest.CaptureFixture[str]) -> Rows:
    """The rows that the command prints."""
    capsys.readouterr()
    code = main(["rank", str(run), *map(str, words)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return [json.loads(line) for line in printed.out.splitlines()]


def lists_of(rows: Rows) -> dict[str, list[str]]:
    """The items of each user, whose ranks must be 1, 2, 3 and so on."""
    lists: dict[str, list[str]] = {}
    for row in rows:
        lists.setdefault(row["user_id"], []).append(row["item_id"])
        assert row["rank"] == len(lists[row["user_id"]])
    return lists


def scores(run: Path, histories: Sequence[Sequence[int]]) -> list[Floats]:
    """What the model gives each item of the catalogue, in the order of the numbers of the source."""
    data = open_data(load_saved(run / "config.yaml").data)
    place = {raw: item for item, raw in enumerate(data.raw_items)}
    order = np.asarray([place[raw_item(number)] for number in range(CYCLE)], dtype=np.int32)
    scorer = SequentialScorer(load_recommender(run / "model"))
    known: list[I32] = [order[list(history)] for history in histories]
    return scorer.score(known, [order] * len(known))


def test_every_user_gets_what_brute_force_finds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole history, its test item included, and no seen item. Scores are the model's."""
    rows = ranked(run, "--top-k", 2, capsys=capsys)
    found = lists_of(rows)
    assert list(found) == [f"{user:03d}" for user in range(NUM_USERS)]
    for user, values in enumerate(scores(run, [items_of(user) for user in range(NUM_USERS)])):
        unseen = [item for item in range(CYCLE) if item not in items_of(user)]
        best = sorted(unseen, key=lambda item: -values[item])[:2]
        assert found[f"{user:03d}"] == [raw_item(item) for item in best]
        own = [row for row in rows if row["user_id"] == f"{user:03d}"]
        assert [row["score"] for row in own] == pytest.approx([values[item] for item in best])
        assert [row["title"] for row in own] == [title(item) for item in best]
        assert not any(row["fallback"] for row in own)


def test_the_formats_hold_the_same_rows(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = ranked(run, capsys=capsys)
    for name in ("recs.parquet", "recs.arrow", "recs.jsonl"):
        assert ranked(run, "--out", tmp_path / name, capsys=capsys) == []
    with pa.OSFile(str(tmp_path / "recs.arrow")) as file:
        arrow = pa.ipc.open_file(file).read_all()
    assert pq.read_table(tmp_path / "recs.parquet").equals(arrow)
    assert arrow.schema.names == ["user_id", "rank", "item_id", "title", "score", "fallback"]
    assert arrow.to_pylist() == printed
    assert [json.loads(line) for line in (tmp_path / "recs.jsonl").read_text(encoding="utf-8").splitlines()] == printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recs.arrow", "recs.jsonl", "recs.parquet"]


def test_a_split_asks_what_evaluation_asks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The history before the target: the last item of a user is not among those seen."""
    found = lists_of(ranked(run, "--split", "test", "--top-k", CYCLE, capsys=capsys))
    for user in range(NUM_USERS):
        assert set(found[f"{user:03d}"]) == {raw_item(item) for item in range(CYCLE)} - set(map(raw_item, items_of(user)[:-1]))


def write_histories(path: Path, histories: dict[str, list[Any]], *, column: str = "history", joined: bool = False) -> Path:
    """A file of the format that its suffix names. joined: a csv cell is text with | between, else a JSON list."""
    if path.suffix == ".jsonl":
        lines = [json.dumps({"user_id": user, column: names}) for user, names in histories.items()]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["more", "user_id", column])
            for user, names in histories.items():
                writer.writerow(["x", user, "|".join(map(str, names)) if joined else json.dumps(names)])
    else:
        pq.write_table(pa.table({"user_id": list(histories), column: list(histories.values())}), path)
    return path


@pytest.mark.parametrize("name", ["h.jsonl", "h.csv", "h.parquet", "joined.csv"])
def test_histories_are_ids_or_titles_in_any_format(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids keep their leading zeros, unknown items are skipped, and a user without a known item gets the popular ones."""
    histories: dict[str, list[Any]] = {
        "0042": ["03", "04", "05"],
        "42": [title(3), "  Film   e ", title(5)],
        "mixed": ["nobody knows", "03", title(4), "5", "05"],
        "none known": ["3", "film d"],
        "empty": [],
    }
    path = write_histories(tmp_path / name, histories, joined=name == "joined.csv")
    rows = ranked(run, "--histories", path, "--top-k", 3, capsys=capsys)
    found = lists_of(rows)
    assert list(found) == list(histories)
    assert found["0042"] == found["42"] == found["mixed"] and found["0042"][0] == "06"
    values = scores(run, [[3, 4, 5]])[0]
    own = [row["score"] for row in rows if row["user_id"] == "mixed"]
    assert own == pytest.approx(sorted((value for item, value in enumerate(values) if item not in (3, 4, 5)), reverse=True)[:3])
    data = open_data(load_saved(run / "config.yaml").data)
    popular = sorted(range(CYCLE), key=lambda item: (-data.train_counts[item], item))[:3]
    assert found["none known"] == found["empty"] == [data.raw_items[item] for item in popular]
    assert {row["user_id"] for row in rows if row["fallback"]} == {"none known", "empty"}
    capsys.readouterr()
    assert main(["rank", str(run), "--histories", str(path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("WARNING: 4 items of histories") for line in lines)  # two of `mixed`, two of `none known`
    assert any(line.startswith("WARNING: 2 users have no known item") for line in lines)


def test_whole_numbers_are_read_as_they_are_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10 is the id "10"; 3 is not the id "03"."""
    path = tmp_path / "h.jsonl"
    path.write_text('\ufeff{"user_id": 7, "history": [10, 3], "more": 1}\n', encoding="utf-8")
    rows = ranked(run, "--histories", path, "--top-k", 1, capsys=capsys)
    assert [(row["user_id"], row["item_id"], row["fallback"]) for row in rows] == [("7", "00", False)]
    pq.write_table(pa.table({"user_id": pa.array([7], pa.int64()), "history": [[10, 3]]}), tmp_path / "h.parquet")
    assert ranked(run, "--histories", tmp_path / "h.parquet", "--top-k", 1, capsys=capsys) == rows


def test_allow_deny_and_seen_items(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    histories = write_histories(tmp_path / "h.jsonl", {"u": ["03", "04", "05"]})
    allow, deny = tmp_path / "allow.txt", tmp_path / "deny.txt"
    allow.write_text(f"\n05\n06\r\n{title(7)}\n08\nunknown\n", encoding="utf-8")
    deny.write_text("08\n", encoding="utf-8")
    words = ("--histories", histories, "--allow", allow, "--deny", deny)
    assert sorted(lists_of(ranked(run, *words, capsys=capsys))["u"]) == ["06", "07"]
    assert sorted(lists_of(ranked(run, *words, "--no-exclude-seen", capsys=capsys))["u"]) == ["05", "06", "07"]
    values = scores(run, [[3, 4, 5]])[0]
    wanted = [raw_item(item) for item in sorted((5, 6, 7, 8), key=lambda item: -values[item])]
    words = ("--histories", histories, "--allow", allow, "--no-exclude-seen")
    assert lists_of(ranked(run, *words, capsys=capsys))["u"] == wanted


@pytest.mark.parametrize("name", ["c.jsonl", "c.csv", "c.parquet"])
def test_candidates_of_users(run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Users without a list are left out. Of a list, seen and unknown items are."""
    candidates = {"001": ["00", "10", title(1), "who", "10"], "other": ["00"], "000": ["00", "01"], "003": []}
    path = write_histories(tmp_path / name, candidates, column="candidates")
    found = lists_of(ranked(run, "--candidates", path, capsys=capsys))
    values = scores(run, [items_of(1)])[0]
    assert found == {"001": [raw_item(item) for item in sorted((0, 10), key=lambda item: -values[item])]}
    found = lists_of(ranked(run, "--candidates", path, "--no-exclude-seen", "--top-k", 1, capsys=capsys))
    assert set(found) == {"000", "001"}
    capsys.readouterr()
    assert main(["rank", str(run), "--candidates", str(path)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: ")]
    assert f"WARNING: {NUM_USERS - 3} users have no list of candidates and were left out" in lines
    assert "WARNING: 1 lists of candidates belong to no user" in lines
    assert "WARNING: 2 users have no item left to recommend" in lines


@pytest.mark.parametrize("name", ["recs.jsonl", "recs.parquet", "recs.arrow", "recs.csv"])
def test_a_ranking_is_a_file_of_candidates(run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One item a row, with the rows of a user one below another."""
    whole, path = ranked(run, "--top-k", 3, capsys=capsys), tmp_path / name
    if path.suffix == ".csv":
        lines = ["rank,item_id,user_id", *(f"{row['rank']},{row['item_id']},{row['user_id']}" for row in reversed(whole))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        ranked(run, "--top-k", 3, "--out", path, capsys=capsys)
    found = lists_of(ranked(run, "--candidates", path, "--top-k", 5, capsys=capsys))
    assert found == lists_of(whole) and max(len(items) for items in found.values()) == 3


def test_a_user_twice_or_an_item_missing_in_such_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.csv"
    path.write_text("user_id,item_id\n001,00\n000,00\n001,10\n", encoding="utf-8")
    refused(run, "--candidates", path, says=("c.csv:4", "'001'", "twice"), folder=tmp_path, capsys=capsys)
    path.write_text("user_id,item_id\n001,00\n001,\n", encoding="utf-8")
    refused(run, "--candidates", path, says=("c.csv:3", "item_id", "is empty"), folder=tmp_path, capsys=capsys)
    path.write_text("user_id,item\n001,00\n", encoding="utf-8")
    refused(run, "--candidates", path, says=("c.csv:1", "candidates", "user_id, item"), folder=tmp_path, capsys=capsys)


def test_popularity_ranks_by_counts_and_ties_by_item(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_data(load_saved(run / "config.yaml").data)
    words = ("evaluate.ranker=popularity", "--no-exclude-seen", "--top-k", CYCLE)
    rows = ranked(run / "config.yaml", *words, capsys=capsys)
    popular = sorted(range(CYCLE), key=lambda item: (-data.train_counts[item], item))
    assert len(set(data.train_counts.tolist())) < CYCLE, "some counts are equal"
    assert lists_of(rows)["005"] == [data.raw_items[item] for item in popular]
    assert [row["score"] for row in rows[:CYCLE]] == [float(data.train_counts[item]) for item in popular]
    assert ranked(run, *words, capsys=capsys) == rows


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("h.txt", "", ("--histories", "h.txt", ".jsonl, .csv, .parquet")),
        ("missing.csv", None, ("--histories", "missing.csv", "is no file")),
        ("h.jsonl", "", ("--histories", "holds no user")),
        ("h.jsonl", '{"user_id": "a", "history": []}\n{"user_id": "b", "history": [}\n', ("h.jsonl:2", "not a JSON object")),
        ("h.jsonl", "[1]\n", ("h.jsonl:1", "not a JSON object", "history")),
        ("h.jsonl", '{"history": []}\n', ("h.jsonl:1", "user_id", "is missing")),
        ("h.jsonl", '{"user_id": true, "history": []}\n', ("h.jsonl:1", "user_id", "true")),
        ("h.jsonl", '{"user_id": "", "history": []}\n', ("h.jsonl:1", "user_id", "is empty")),
        ("h.jsonl", '{"user_id": "\\ud800", "history": []}\n', ("h.jsonl:1", "user_id", "half a character")),
        ("h.jsonl", '{"user_id": 1, "history": "03"}\n', ("h.jsonl:1", "history", "no list")),
        ("h.jsonl", '{"user_id": 1}\n', ("h.jsonl:1", "history", "is missing")),
        ("h.jsonl", '{"user_id": 1, "history": ["03", 0.5]}\n', ("h.jsonl:1", "history[1]", "0.5")),
        ("h.jsonl", '{"user_id": 1, "history": ["03"]}\n\n{"user_id": "1", "history": []}\n', ("h.jsonl:3", "'1'", "row 1")),
        ("h.csv", "", ("h.csv:1", "user_id", "missing")),
        ("h.csv", "user_id,items\na,03\n", ("h.csv:1", "history", "user_id, items")),
        ("h.csv", "user_id,history,history\n", ("h.csv:1", "two columns")),
        ("h.csv", "user_id,history\na,03,04\n", ("h.csv:2", "3 columns instead of 2")),
        ("h.csv", 'user_id,history\na,"[1, 2"\n', ("h.csv:2", "history", "JSON list")),
        ("h.csv", 'user_id,history\na,"03\n', ("h.csv:2", "csv")),
        ("h.parquet", "PAR1", ("h.parquet", "not a Parquet file")),
    ],
)
def test_a_bad_file_is_one_line_and_leaves_nothing(
    run: Path, tmp_path: Path, name: str, text: str | None, says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    refused(run, "--histories", path, says=says, folder=tmp_path, capsys=capsys)


def refused(run: Path, *words: object, says: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that says all this, and the folder with the output stays as it was."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    out = () if "--out" in words else ("--out", folder / "recs.parquet")
    assert main(["rank", str(run), *map(str, (*words, *out))]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[-1].startswith("error: ") and not [word for word in says if word not in lines[-1]], lines
    assert printed.out == "" and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["rank", "evaluate"])
def test_a_model_that_gives_no_numbers_fails_in_one_line(
    run: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    (weights,) = (broken / "model").glob("*.safetensors")
    save_file({name: np.full_like(value, np.nan) for name, value in load_file(weights).items()}, weights)
    assert main([command, str(broken), "evaluate.num_candidates=2"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("failed: ") and "NaN" in line


def test_a_correction_of_titles_goes_with_language_models(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        run, "evaluate.title_prior=0.5", says=("evaluate.title_prior", "task.kind=sequential"), folder=tmp_path, capsys=capsys
    )


def test_bad_options(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(*words: object, says: tuple[str, ...]) -> None:
        refused(run, *words, says=says, folder=tmp_path, capsys=capsys)

    names, candidates = tmp_path / "names.txt", tmp_path / "c.jsonl"
    names.write_text("who\n", encoding="utf-8")
    candidates.write_text('{"user_id": "001", "candidates": ["03"]}\n{"user_id": "001", "candidates": []}\n', encoding="utf-8")
    refuses("--top-k", 0, says=("--top-k (0)",))
    refuses("--top-k", "many", says=("--top-k", "many"))
    refuses("--out", tmp_path / "recs.csv", says=("--out", "recs.csv", ".parquet, .arrow, .jsonl"))
    refuses("--out", "s3://bucket/recs.parquet", says=("--out", "URI"))
    refuses("--out", names, says=("--out", "must end in"))
    refuses("--split", "test", "--histories", names, says=("--split", "--histories"))
    refuses("--allow", names, says=("--allow", "leaves none", "11 items"))
    refuses("--deny", tmp_path / "no.txt", says=("--deny", "no.txt", "cannot be read"))
    refuses("--candidates", candidates, says=("c.jsonl:2", "'001'", "twice"))
    candidates.write_text('{"user_id": "001", "candidates": ["who"]}\n', encoding="utf-8")
    refuses("--candidates", candidates, says=("--candidates", "names no item"))
    (tmp_path / "there.jsonl").write_text("mine", encoding="utf-8")
    refuses("--out", tmp_path / "there.jsonl", says=("--out", "exists"))


def test_from_python(run: Path, tmp_path: Path) -> None:
    one = rec_dist.rank(run, [["03", "04", title(5)], []], top_k=2)
    assert one.column_names == ["user_id", "rank", "item_id", "title", "score", "fallback"]
    assert one["user_id"].to_pylist() == ["0", "0", "1", "1"] and one["item_id"][0].as_py() == "06"
    by_name = rec_dist.rank(rec_dist.Run.open(run), {"a": ("03", "04", "05")}, top_k=2)
    assert by_name["score"].to_pylist() == one["score"].to_pylist()[:2] and set(by_name["user_id"].to_pylist()) == {"a"}
    out = rec_dist.rank(str(run), out=tmp_path / "recs.parquet", top_k=3, progress=False)
    assert out == tmp_path / "recs.parquet" and pq.read_table(out).equals(rec_dist.rank(run, top_k=3))
    chosen = rec_dist.rank(run, [["03"], ["04"]], candidates=[["09", "10"], ["00"]], allow=["10", "00"], deny=["00"])
    assert chosen["item_id"].to_pylist() == ["10"]
    of_user = rec_dist.rank(run, candidates={"001": ["09", "10"]}, exclude_seen=False)
    assert set(of_user["item_id"].to_pylist()) == {"09", "10"}
    file = write_histories(tmp_path / "h.csv", {"a": ["03", "04", "05"]})
    assert rec_dist.rank(run, file, top_k=2)["score"].to_pylist() == by_name["score"].to_pylist()
    for bad in (7, "no/such.csv", {"a": "03"}, {"1": [], 1: []}, [[0.5]]):
        with pytest.raises(UserError, match="histories"):
            rec_dist.rank(run, bad)
    with pytest.raises(UserError, match="candidates"):
        rec_dist.rank(run, [["03"]], candidates=[["03"], ["04"]])
    with pytest.raises(UserError, match="top-k"):
        rec_dist.rank(run, top_k=0)


def test_evaluation_in_blocks_writes_what_one_block_writes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's run and popularity: metrics, candidates and scores, whatever the size of a block."""
    found = []
    for most in (5, 1 << 22):
        monkeypatch.setattr(measure, "_MOST_EXAMPLES", most)
        for ranker, target in (("model", run), ("popularity", run / "config.yaml")):
            folder = tmp_path / f"{ranker}-{most}"
            words = ["evaluate.num_candidates=all", f"evaluate.output_dir={folder}"]
            metrics = rec_dist.evaluate(target, words + ([f"evaluate.ranker={ranker}"] if target != run else []))
            read = Predictions.read(folder / "predictions.arrow")
            values = [[row.tolist() for row in column] for column in (read.candidates, read.scores)]
            found.append((ranker, metrics, read.ranks.tolist(), values))
    assert found[:2] == found[2:]
    model, popularity = (one[1]["mrr"]["value"] for one in found[:2])
    assert model > popularity, "the next item is known to the model"
