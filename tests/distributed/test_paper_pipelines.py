"""The recipes behind the pages of DMPO, S-DPO, DELRec and P2Rec run from raw files to their table, on made-up data of a small size.

Their stages run in this process, one after another: that each has a process of its own is tested in test_quick_pipeline.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rec_dist.cli import main
from rec_dist.runtime.rng import uniform

pytestmark = pytest.mark.slow  # a dozen trainings and evaluations each
WORDS = ["Lamp", "Desk", "Pen", "Chair", "Shelf", "Clock"]
NARROW = [f"runs.{model}.task.sequential.width=16" for model in ("sasrec", "gru4rec", "caser")]  # the tiny model has width 32
Table = Callable[..., str]


def _title(item: int) -> str:
    return f"{WORDS[item % 6]} {WORDS[item // 6 % 6]} {item}"


def _walk(user: int, num_items: int, length: int) -> list[int]:
    start, skips = int(uniform(1, user) * num_items), uniform(2, user, np.arange(length)) < 0.2
    return [int((start + step) % num_items) for step in np.cumsum(1 + skips)]


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    """60 users with 12 liked items, and 4 that they rated low in between."""
    lines = ["user,item,rating,timestamp,title"]
    for user in range(60):
        walk = _walk(user, 70, 16)
        lines += [
            f"u{user},i{item:02d},{2 if step % 4 == 1 else 4 + step % 2},{step},{_title(item)}" for step, item in enumerate(walk)
        ]
    path = tmp_path / "ratings.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def bear(tmp_path: Path) -> Path:
    """Windows as BEAR has them: the last row of each user is in the test file."""
    folder = tmp_path / "bear"
    folder.mkdir()
    for category in ("Office", "Book"):
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for user in range(60):
            walk = _walk(user, 70, 9)
            for stop in range(2, len(walk) + 1):
                part = "test" if stop == len(walk) else "train"
                parts[part].append(f'u{user},"{walk[max(0, stop - 11) : stop]}",{1000 + stop}')
        for part, rows in parts.items():
            text = "\n".join(["user_id,item_ids,timestamp", *rows]) + "\n"
            (folder / f"{category}.{part}.csv").write_text(text, encoding="utf-8")
        titles = {str(item): _title(item) for item in range(70)}
        (folder / f"{category}.id2name4Rec.json").write_text(json.dumps(titles), encoding="utf-8")
    return folder


@pytest.fixture
def table(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """Runs a recipe in its tiny size, in a folder of its own, and returns its table with single spaces."""
    monkeypatch.chdir(tmp_path)

    def run_recipe(recipe: str, report: str, *words: str) -> str:
        assert main(["run", recipe, f"vars.model={tiny_model_dir}", "vars.size=tiny", *words]) == 0
        return " ".join((tmp_path / "runs" / report / "table.txt").read_text(encoding="utf-8").split())

    return run_recipe


def test_dmpo_with_few_users(table: Table, ratings: Path, tmp_path: Path) -> None:
    source = f"vars.source={ratings}"
    found = table("dmpo-few_shot", "dmpo-few_shot/report-uniform-20", source)
    assert all(f"{a} - {b} auc" in found for a, b in (("k5", "k1"), ("k3", "sdpo"), ("k3", "sasrec"), ("k3", "gru4rec")))
    assert "20 users" in found
    trained = (tmp_path / "runs/dmpo-few_shot/k1/metrics.jsonl").read_bytes()
    found = table("dmpo-few_shot", "dmpo-few_shot/report-low_rated-20", source, "vars.negatives=low_rated")
    assert "k5 - k1 auc" in found
    assert (tmp_path / "runs/dmpo-few_shot/k1/metrics.jsonl").read_bytes() == trained
    row = json.loads((tmp_path / "runs/dmpo-few_shot/k1-low_rated-20/evaluation.json").read_text(encoding="utf-8"))["row"]
    assert (row["num_candidates"], row["left_out_users"]) == ("low_rated", 20)  # those who trained


def test_dmpo_across_domains(table: Table, ratings: Path, bear: Path) -> None:
    sources = (f"vars.source={bear}", f"vars.movies_source={ratings}")
    assert "dmpo from bear - dmpo from movies ndcg@10" in table("dmpo-cross", "dmpo-cross/report-to_bear", *sources)
    back = table("dmpo-cross", "dmpo-cross/report-to_movies", *sources, "vars.from=bear", "vars.to=movies")
    assert "sft from movies - sasrec from movies auc" in back


def test_sdpo_by_the_number_of_negatives(table: Table, ratings: Path, tmp_path: Path) -> None:
    found = table("sdpo", "sdpo/report", f"vars.source={ratings}", "matrix.seed=[0,1]")
    assert "S-DPO K=19 - S-DPO K=7 ndcg@10" in found and "MPPO K=7 - S-DPO K=7 hr@1" in found and "recpo K=7" in found
    assert "over seeds" in found
    assert "negatives (K); 0 is SFT" in (tmp_path / "runs/sdpo/report/report.html").read_text(encoding="utf-8")


def test_delrec(table: Table, ratings: Path) -> None:
    source = f"vars.source={ratings}"
    found = table("delrec", "delrec/report", source, "matrix.seed=[0,1]")
    assert "DELRec from SASRec - DELRec from nothing ndcg@10" in found and "over seeds" in found
    assert "DELRec from Caser - Caser ndcg@10" in table("delrec-teachers", "delrec/report-teachers", source)
    assert "both - no_temporal ndcg@10" in table("delrec-ablations", "delrec/report-ablations", source)


def test_p2rec(table: Table, ratings: Path) -> None:
    found = table("p2rec", "p2rec/report", f"vars.source={ratings}", "matrix.seed=[0,1]", *NARROW)
    assert "caser p2rec - caser shuffled ndcg@10" in found and "over seeds" in found


def test_p2rec_on_amazon(table: Table, bear: Path) -> None:
    found = table("p2rec-amazon", "p2rec-amazon/report", f"vars.source={bear}", "matrix.seed=[0]", *NARROW)
    assert "gru4rec p2rec - gru4rec raw hr@10" in found and "60 users" in found
