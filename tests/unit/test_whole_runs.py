"""Inputs of the benchmarks of whole runs.

A model written in pieces is a valid model, and a plan describes the run that was measured.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plan_memory, published, results, scaling, three_billion, whole_runs
from benchmarks.peer_methods import Shape
from benchmarks.whole_runs import SHAPES, write_model
from rec_dist.plan.workload import Workload

SMALL = Shape(hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, vocab=320)


def test_a_model_written_in_pieces_is_whole_and_the_same_in_pieces_of_any_size(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    write_model(tmp_path / "one", SMALL, tiny_tokenizer, dtype=torch.float32)
    monkeypatch.setattr(whole_runs, "_SHARD_BYTES", 20_000)
    write_model(tmp_path / "many", SMALL, tiny_tokenizer, dtype=torch.float32)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    models = []
    for name in ("one", "many"):
        model, about = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not about["missing_keys"] and not about["unexpected_keys"]
        models.append(dict(model.named_parameters()))
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert sum(value.numel() for value in models[0].values()) == SMALL.num_weights
    assert float(models[0]["model.layers.1.mlp.up_proj.weight"].detach().std()) == pytest.approx(0.02, rel=0.05)


def test_three_billion_are_three_billion() -> None:
    assert 2.95e9 < SHAPES["3B"].num_weights < 3.1e9
    assert 4 * SHAPES["3B"].num_weights < 12.5e9


@pytest.mark.parametrize("tokens", [80.0, 123.5])
def test_the_plan_of_a_measured_run_has_its_rows(tokens: float) -> None:
    found = plan_memory.lengths(tokens, negatives=3)
    assert Workload(8, 1, 3, found["prompt_tokens"], found["completion_tokens"]).rows == pytest.approx(tokens)


def test_a_published_run_is_planned_as_its_source_describes_it() -> None:
    """Llama 2 7B has 6.74e9 weights, LoRA r8 on q and v of 32 layers 4,194,304 (the source's count): 13.5 GB in bfloat16."""
    run = next(run for run in published.RUNS if run.model == "llama2-7b" and run.batch == 2)
    plan = published.make_plan(published.config_of(run))
    assert plan["model"]["trainable"] == 4_194_304
    assert plan["memory"]["parts"]["parameters"] == pytest.approx(13.49e9, rel=0.001)
    assert plan["workload"]["prompt_rows"] == run.sequence
    assert plan["workload"]["micro_batches_per_step"] == 1
    row = published.row_of(run)
    assert row["GB, published"] == "29.1"
    assert row["tokens/s a device, published"] is None


def test_the_report_of_three_billion_says_whether_the_limit_is_met() -> None:
    worker = {"before_model": 6e8, "private": 9.9e9, "resident_loading": 13e9, "resident_training": 10.1e9}
    result = {
        "weights": 3_000_000_000,
        "float32_bytes": 12e9,
        "workers": [worker, worker],
        "together": 19.8e9,
        "predicted": {"parameters": 6e9, "reserved": 7e8, "total": 9.5e9},
        "seconds": 300.0,
        "steps": [{"step": 1, "loss": 0.7, "grad_norm": 1.0, "tokens": 60, "step_seconds": 20.0}],
    }
    text = three_billion.report(result)
    assert "19.80 GB together, limit 20 GB: met; 9.90 GB in one process, 0.82 of the model" in text
    assert "limit 20 GB: NOT met" in three_billion.report({**result, "together": 20.1e9})


def test_private_memory_is_what_a_process_holds_itself() -> None:
    code = "import sys; held = b'x' * 200_000_000; print('held', flush=True); sys.stdin.read()"
    with (
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
        whole_runs.PrivateMemory([child.pid, os.getpid()]) as memory,
    ):
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "held\n"
        time.sleep(0.2)
        child.stdin.close()
        child.wait()
    assert 200e6 < memory.most[0] < 260e6
    assert memory.most_together >= memory.most[0] + 50e6, "this process holds torch"
    assert whole_runs.private_bytes(child.pid) == 0


def test_scaling_reckons_with_cores_and_refuses_runs_that_differ() -> None:
    def row(workers: int, seconds: float, losses: list[float]) -> dict[str, Any]:
        took = {"median": seconds, "low": seconds, "high": seconds}
        return {"size": "25M", "workers": workers, "losses": losses, "tokens_per_step": 1000.0, "seconds": took}

    rows = [row(1, 8.0, [1.0, 0.5]), row(2, 5.0, [1.0, 0.5]), row(4, 5.0, [1.0, 0.50001])]
    scaling.check_same(rows)
    about = results.facts("python -m benchmarks.scaling", cores=2, rows=rows)
    lines = scaling.report(about).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["1.00", "0.80", "0.80"]
    with pytest.raises(SystemExit, match="the losses of 2 workers differ"):
        scaling.check_same([rows[0], row(2, 5.0, [1.0, 0.6])])
