"""evaluate.search=exact: the rank that a search finds is that of scoring every title, and what it cannot say is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import rec_dist
from rec_dist.cli import main
from rec_dist.commands.ranked_model import ranked_model
from rec_dist.data.artifacts.predictions import Predictions
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.measure import metrics_per_question, ranked_in_blocks
from rec_dist.methods.searched_ranks import rank_in_catalogue
from rec_dist.report.compare import compare
from rec_dist.storage.files import write_json

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("changes", [(), ("task.kind=msl", "task.msl.temperature=2")], ids=["raw", "trie"])
def test_the_rank_of_a_search_is_that_of_brute_force(changes: tuple[str, ...], tiny_config: Make, tmp_path: Path) -> None:
    """Any history, target, limit and treatment of seen items. Scores that are closer than rounding are passed over."""
    model, rng = ranked_model(tiny_config(tmp_path / "run", *changes), ()), np.random.default_rng(0)
    every, compared, beyond = np.arange(model.data.num_items, dtype=np.int32), 0, 0
    with model.scorer() as scorer:
        for number in range(24):
            history = rng.choice(every, rng.integers(1, 8), replace=False).astype(np.int32)
            target, limit, exclude_seen = int(rng.choice(every)), int(rng.integers(1, 90)), bool(number % 2)
            (scores,) = scorer.score([history], [every])
            others = np.setdiff1d(every, [target])
            if exclude_seen:
                others = np.setdiff1d(others, history)
            if np.abs(scores[others] - scores[target]).min() < 1e-4:
                continue
            rank = 1 + int((scores[others] >= scores[target]).sum())
            example = EvalExample(0, len(history), target, history, every)
            found, _ = rank_in_catalogue(scorer, example, model.data, exclude_seen=exclude_seen, limit=limit)
            assert found == (rank if rank <= limit else None)
            compared, beyond = compared + 1, beyond + (found is None)
    assert compared > 15 and 0 < beyond < compared


def predictions(ranks: list[int | None]) -> Predictions:
    items = np.arange(500, dtype=np.int32)
    asked = [EvalExample(user, 3, 7, items[:2], items) for user in range(len(ranks))]
    (block,) = ranked_in_blocks(asked, ranks, np.ones(500, dtype=np.int64), limit=100)
    return block


def test_metrics_up_to_the_limit_are_those_of_all_ranks(tmp_path: Path) -> None:
    limited, whole = predictions([1, 3, 100, None]), replace(predictions([1, 3, 100, 377]), rank_limit=None)
    assert limited.ranks.tolist() == [1, 3, 100, 101]
    found, wanted = metrics_per_question(limited), metrics_per_question(whole)
    assert set(wanted) - set(found) == {"mrr", "auc"}
    assert all(found[name].tolist() == wanted[name].tolist() for name in found)
    limited.write(tmp_path / "predictions.arrow")
    assert Predictions.read(tmp_path / "predictions.arrow").rank_limit == 100


def test_a_comparison_refuses_metrics_that_one_of_its_models_lacks(tmp_path: Path) -> None:
    for name, limit in (("scored", None), ("searched", 100)):
        folder = tmp_path / name
        folder.mkdir()
        replace(predictions([1, 3, 5]), rank_limit=limit).write(folder / "predictions.arrow")
        write_json(folder / "evaluation.json", {"row": {"split": "test", "num_candidates": "all", "exclude_seen": True}})
    folders = {name: [tmp_path / name] for name in ("scored", "searched")}
    done = compare(folders, [("scored", "searched")], ["hr@1", "ndcg@10"])
    assert [difference.interval["value"] for difference in done.differences] == [0, 0]
    with pytest.raises(UserError, match=r"names mrr, which searched .*evaluate\.search"):
        compare(folders, [], ["hr@1", "mrr"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["evaluate.num_candidates (5)", "set evaluate.num_candidates=all"]),
        (["evaluate.num_candidates=all", "evaluate.ranker=popularity"], ["language models", "leave it out"]),
        (["evaluate.num_candidates=all", "evaluate.title_prior=0.5"], ["corrected", "evaluate.title_prior=0"]),
        (["evaluate.num_candidates=all", "prompt.candidates=listed"], ["prompt.candidates=listed"]),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    words: list[str], named: list[str], tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", "evaluate.num_candidates=5")), encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    assert main(["evaluate", str(path), "evaluate.search=exact", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: evaluate.search=exact") and all(word in line for word in named)
    assert sorted(tmp_path.iterdir()) == before


def test_a_home_folder_is_found_from_python(tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path / "run")), encoding="utf-8")
    changes = {"evaluate.ranker": "popularity", "evaluate.num_candidates": 5}
    assert rec_dist.evaluate("~/config.yaml", changes)["hr@1"]["n"] > 0
    lists = rec_dist.rank("~/run-popularity", [["i003"]], changes, top_k=1)
    assert lists.num_rows == 1
