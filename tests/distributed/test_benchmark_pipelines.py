"""The pipelines behind the tables of docs/methods/quality.md run from raw files to their table, on made-up data of a small size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_processes import start_command

from rec_dist.config.shipped import configs_dir
from rec_dist.runtime.rng import uniform

pytestmark = pytest.mark.slow  # each stage is a process of its own
TIMEOUT_SECONDS = 900.0  # for a dozen stages, of which each starts Python
WORDS = ["Lamp", "Desk", "Pen", "Chair", "Shelf", "Clock"]


def _walks(num_users: int, num_items: int, length: int) -> list[list[int]]:
    """Users who mostly go from an item to the next one, each item once."""
    found = []
    for user in range(num_users):
        start, skips = int(uniform(1, user) * num_items), uniform(2, user, np.arange(length)) < 0.2
        steps = np.cumsum(1 + skips)
        found.append([int((start + step) % num_items) for step in steps])
    return found


def _title(item: int) -> str:
    return f"{WORDS[item % 6]} {WORDS[item // 6 % 6]} {item}"


def _ratings(path: Path) -> Path:
    lines = ["user,item,rating,timestamp,title"]
    for user, walk in enumerate(_walks(40, 60, 12)):
        lines += [f"u{user},i{item:02d},{4 + step % 2},{step},{_title(item)}" for step, item in enumerate(walk)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _bear(folder: Path) -> Path:
    """Windows as BEAR has them: the last row of each user is in the test file."""
    import json

    folder.mkdir()
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for user, walk in enumerate(_walks(60, 60, 9)):
        for stop in range(2, len(walk) + 1):
            part = "test" if stop == len(walk) else "train"
            parts[part].append(f'u{user},"{walk[max(0, stop - 11) : stop]}",{1000 + stop}')
    for part, rows in parts.items():
        text = "\n".join(["user_id,item_ids,timestamp", *rows]) + "\n"
        (folder / f"Office.{part}.csv").write_text(text, encoding="utf-8")
    (folder / "Office.id2name4Rec.json").write_text(json.dumps({str(item): _title(item) for item in range(60)}))
    return folder


def _table(folder: Path, pipeline: str | Path, *more: str, **values: object) -> str:
    words = [*more, *(f"vars.{key}={value}" for key, value in values.items())]
    child = start_command(folder / "log", "run", pipeline, *words)
    assert child.wait(TIMEOUT_SECONDS) == 0, child.err[-3000:]
    return (folder / "runs" / "report" / "table.txt").read_text(encoding="utf-8")


def test_ml_1m(tmp_path: Path) -> None:
    places = {"data": tmp_path / "data", "runs": tmp_path / "runs"}
    sizes = {"width": 16, "epochs": 2, "gru_epochs": 2}
    path = configs_dir() / "benchmarks" / "ml-1m.yaml"
    table = _table(tmp_path, path, source=_ratings(tmp_path / "r.csv"), **places, **sizes)
    assert "HSTU-large" in table and "0.329" in table
    assert "neighbours, SASRec, GRU4Rec - SASRec" in " ".join(table.split())
    assert "share of GRU4Rec in neighbours, SASRec, GRU4Rec" in " ".join(table.split())  # each member's share
    assert "40 users" in table


def _minionerec(folder: Path) -> Path:
    """Rows of a history and its target in the order of time; the last of each user is in the test file."""
    folder.mkdir()
    header = "user_id,history_item_title,item_title,history_item_id,item_id"
    parts: dict[str, list[str]] = {"valid": [], "test": []}
    walks = _walks(60, 60, 9)
    for stop in range(1, 9):
        for user, walk in enumerate(walks):
            row = f'u{user},[],x,"{walk[:stop]}",{walk[stop]}'
            parts["test" if stop == 8 else "valid"].append(row)
    for part, rows in parts.items():
        (folder / f"Industrial_and_Scientific.{part}.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    info = "".join(f"<a_{item}>\t{_title(item)}\t{item}\n" for item in range(60))
    (folder / "Industrial_and_Scientific.info.txt").write_text(info, encoding="utf-8")
    return folder


def test_minionerec_without_the_language_model_on_the_last_rows(tmp_path: Path) -> None:
    path = configs_dir() / "benchmarks" / "minionerec-industrial.yaml"
    places = {"data": tmp_path / "data", "runs": tmp_path / "runs"}
    changes = {"split": "global_temporal", "epochs": 2}
    table = _table(tmp_path, path, "matrix.lm=[]", source=_minionerec(tmp_path / "source"), **places, **changes)
    assert "60 users" in table and "MiniOneRec" in table
    assert "SmolLM2" not in table


def test_bear_office(tmp_path: Path, tiny_model_dir: Path) -> None:
    source = _bear(tmp_path / "source")
    path = configs_dir() / "benchmarks" / "bear-office.yaml"
    places = {"data": tmp_path / "data", "runs": tmp_path / "runs", "model": tiny_model_dir}
    narrow = ["runs.cosines.task.neighbours.embedding_width=16", "runs.retrieval.task.retrieval.width=16"]  # as the tiny model
    table = _table(tmp_path, path, *narrow, source=source, **places, epochs=2, lm_steps=1)
    assert "share of retrieval in" in " ".join(table.split())
    assert "60 users" in table
    assert "kept" in table and "removed" in table


def test_results(tmp_path: Path, tiny_model_dir: Path) -> None:
    places = {"data": tmp_path / "data", "runs": tmp_path / "runs", "model": tiny_model_dir}
    table = _table(tmp_path, "results", source=_ratings(tmp_path / "r.csv"), **places, steps=2, sasrec_epochs=1, users=30)
    text = " ".join(table.split())
    assert "share of SFT in neighbours, SASRec, SFT" in text
    assert "neighbours, SASRec, SFT - neighbours, SASRec ndcg@10" in text
    assert "30 users" in table


@pytest.mark.quick
def test_cold_items_have_columns_of_their_own(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    import rec_dist
    from rec_dist.commands.evaluate import table_of

    source = _ratings(tmp_path / "r.csv")
    data = {"data.source": str(source), "data.path": str(tmp_path / "data"), "data.cold_items_fraction": 0.3}
    config = tiny_config(tmp_path / "run", "task.kind=neighbours", "evaluate.num_candidates=all", data)
    rec_dist.prepare(config)
    run = rec_dist.train(config)
    rec_dist.evaluate(run)
    row = run.metrics("evaluation")[-1]
    sizes = {part: values["ndcg@10"]["n"] for part, values in row["parts"].items()}
    assert sizes["cold"] > 0 and sizes["cold"] + sizes["warm"] == row["metrics"]["ndcg@10"]["n"]
    assert f"cold ({sizes['cold']})" in table_of(row)
    # only neighbours by title can find what training never saw
    assert row["parts"]["warm"]["ndcg@10"]["value"] > row["parts"]["cold"]["ndcg@10"]["value"]
