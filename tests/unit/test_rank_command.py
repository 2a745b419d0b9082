"""`rec-dist rank` on a small recommender: every form of users and of output, what is left out, and errors that leave nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_runs import CYCLE, NUM_USERS, finished_run, items_of, raw_item, title

from rec_dist.cli import main
from rec_dist.config.load import load_saved
from rec_dist.data.dataset.prepared_data import open_data
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
