"""`rec-dist run`: a whole comparison from one file, which is kept when it runs again and reports a stage that fails."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from worker_processes import run_command

pytestmark = pytest.mark.slow  # each stage is a process of its own


@pytest.fixture
def pipeline(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> Path:
    """prepare -> SFT -> S-DPO -> evaluate. SFT is a file beside the pipeline, S-DPO one of the pipeline's runs."""
    sft, sdpo = tmp_path / "sft", tmp_path / "sdpo"
    data = {"data.path": str(tmp_path / "prepared")}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(tiny_config(sft, data)), encoding="utf-8")
    runs = {"sdpo": {"extends": "sft.yaml", "task": {"kind": "sdpo"}, "train": {"run_dir": str(sdpo), "init_from": str(sft)}}}
    stages = [
        {"name": "prepare", "do": "prepare", "target": "sft.yaml"},
        {"name": "train SFT", "do": "train", "target": "sft.yaml"},
        {"name": "train S-DPO", "do": "train", "target": "sdpo"},
        {"name": "popularity", "do": "evaluate", "target": "sft.yaml", "set": ["evaluate.ranker=popularity"]},
        {"name": "base", "do": "evaluate", "target": "sft.yaml"},
        {"name": "of ${matrix.run}", "do": "evaluate", "target": f"{tmp_path}/${{matrix.run}}"},
    ]
    value = {
        "title": "Tiny",
        "run_dir": str(tmp_path / "report"),
        "stages": stages,
        "pairs": [["of ${matrix.run}", "popularity"]],
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"matrix": {"run": ["sft", "sdpo"]}, "runs": runs, "pipeline": value}), encoding="utf-8")
    return path


def test_twice_is_the_same(pipeline: Path, tmp_path: Path) -> None:
    code, child = run_command(tmp_path, "run", pipeline)
    assert code == 0, child.err[-3000:]
    table = (tmp_path / "report" / "table.txt").read_text(encoding="utf-8")
    assert [name in table for name in ("popularity", "base", "of sft", "of sdpo", "hr@1", "ndcg@10")] == [True] * 6
    assert table in child.out
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "of sdpo" in html
    assert "</html>" in html
    environment = json.loads((tmp_path / "sft" / "environment.json").read_text(encoding="utf-8"))
    assert environment["command"][1:] == ["train", str(tmp_path / "sft.yaml")], "what repeats the stage"
    metrics = {name: (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("sft", "sdpo", "sft-base", "sft-popularity")}
    weights = (tmp_path / "sdpo" / "model" / "adapter_model.safetensors").read_bytes()

    code, child = run_command(tmp_path, "run", pipeline)
    assert code == 0
    assert (tmp_path / "report" / "table.txt").read_text(encoding="utf-8") == table
    assert child.err.count("nothing to do") == 6
    assert "kept" in child.err
    assert {name: (tmp_path / name / "metrics.jsonl").read_bytes() for name in metrics} == metrics
    assert (tmp_path / "sdpo" / "model" / "adapter_model.safetensors").read_bytes() == weights


def test_a_failed_stage_ends_it_with_its_exit_code(pipeline: Path, tmp_path: Path) -> None:
    value = yaml.safe_load(pipeline.read_text(encoding="utf-8"))
    value["pipeline"]["stages"][1]["set"] = ["train.max_tokens_per_micro_batch=20"]
    pipeline.write_text(yaml.safe_dump(value), encoding="utf-8")
    code, child = run_command(tmp_path, "run", pipeline)
    assert code == 2
    assert child.err.count("error: train.max_tokens_per_micro_batch (20)") == 1
    assert "stage train SFT ended with exit code 2" in child.err
    assert "train S-DPO:" not in child.err  # later stages did not begin
    assert not (tmp_path / "report" / "report.html").exists()
