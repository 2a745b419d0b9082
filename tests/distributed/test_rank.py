"""What `rec-dist rank` serves is what `rec-dist evaluate` measured: the same scores for the same users and candidates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from worker_processes import run_command

import rec_dist
from rec_dist.data.artifacts.predictions import Predictions

pytestmark = pytest.mark.slow
Make = Callable[..., dict[str, Any]]


@pytest.mark.quick
@pytest.mark.parametrize("task", [["task.kind=sft"], ["task.kind=sequential", "adapter.kind=none"]], ids=["sft", "sasrec"])
def test_ranked_scores_are_evaluated_scores(tiny_config: Make, tmp_path: Path, task: list[str]) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tiny_config(run, *task)), encoding="utf-8")
    for words in (("train", config), ("evaluate", run)):
        code, child = run_command(tmp_path / "log", *words)
        assert code == 0, child.err
    data, predictions = rec_dist.prepare(config), Predictions.read(run / "predictions.arrow")
    rows = data.split("test")
    names = dict(zip(rows.user_ids.tolist(), rows.names_of(np.arange(len(rows))), strict=True))
    candidates = {
        names[user]: [data.raw_items[item] for item in items.tolist()]
        for user, items in zip(predictions.user_ids.tolist(), predictions.candidates, strict=True)
    }
    path, out = tmp_path / "candidates.jsonl", tmp_path / "recs.jsonl"
    lines = [json.dumps({"user_id": user, "candidates": items}) for user, items in candidates.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    words = ("--split", "test", "--candidates", path, "--top-k", 100, "--no-exclude-seen", "--out", out)
    code, child = run_command(tmp_path / "log", "rank", run, *words)
    assert code == 0, child.err
    found = {(row["user_id"], row["item_id"]): row["score"] for row in map(json.loads, out.read_text("utf-8").splitlines())}
    wanted = {
        (names[user], data.raw_items[item]): float(score)
        for user, items, scores in zip(predictions.user_ids.tolist(), predictions.candidates, predictions.scores, strict=True)
        for item, score in zip(items.tolist(), scores, strict=True)
    }
    assert found == pytest.approx(wanted, abs=1e-4)
