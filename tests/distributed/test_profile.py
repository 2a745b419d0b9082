"""`rec-dist profile` on the tiny model: its numbers agree with the plan and each other, and it writes to its own folder only."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from worker_processes import run_command, run_workers, start, start_command

from rec_dist.profiling.phases import PHASES

Make = Callable[..., dict[str, Any]]
STEPS = ("profile.warmup_steps=1", "profile.steps=3")


def planned(config: dict[str, Any], steps: range) -> dict[str, int]:
    """What the plan counts for these steps."""
    from rec_dist.config.schema import RunConfig
    from rec_dist.methods.registry import build_task, find_initial_weights
    from rec_dist.runtime.world import World
    from rec_dist.training.loader import step_work

    parsed = RunConfig.model_validate(config)
    task = build_task(parsed, find_initial_weights(parsed), "cpu")
    plans = [step_work(task, step, max_tokens=parsed.train.max_tokens_per_micro_batch, world=World()) for step in steps]
    return {
        "tokens": sum(plan.num_tokens for plan in plans),
        "logical_tokens": sum(plan.num_logical_tokens for plan in plans),
        "groups": sum(plan.num_groups for plan in plans),
    }


def check_consistent(report: dict[str, Any], config: dict[str, Any], *, workers: int) -> None:
    expected = planned(config, range(1, 4))
    for side in (report["real"], report["synthetic"], report["real_again"]):
        assert side["steps"] == 3
        assert {name: side[name] for name in expected} == expected
        assert set(side["shares"]) == {*PHASES, "other"}
        assert sum(side["shares"].values()) == pytest.approx(1.0, abs=1e-9)
        assert all(0 <= share <= 1 for share in side["shares"].values())
        assert side["shares"]["forward"] > 0.02 and side["shares"]["backward"] > 0.02 and side["shares"]["optimizer"] > 0
        assert 0 < side["step_seconds"]["p50"] <= side["step_seconds"]["p95"]
        seconds = side["step_seconds"]["mean"] * side["steps"]
        for name, count in expected.items():
            assert side[f"{name}_per_second"] * seconds == pytest.approx(count)
    assert report["padding_share"] == 0.0
    assert report["settings"]["workers"] == workers
    assert report["recompilations_after_warmup"] == 0
    memory, compute = report["memory"], report["compute"]
    assert 0 < memory["before_first_micro_batch_bytes"] <= memory["peak_bytes"] < memory["total_bytes"]
    assert memory["headroom_share"] == pytest.approx(1 - memory["peak_bytes"] / memory["total_bytes"])
    assert 0 < compute["mfu"] < compute["hfu"] < 1
    assert 0 <= report["communication"]["share_of_traced_step"] <= 1
    assert len(report["ranks"]["own_seconds"]) == workers and 0 <= report["ranks"]["slowest_rank"] < workers


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def test_a_profile_and_its_comparison(tmp_path: Path, tiny_config: Make) -> None:
    config = tiny_config(tmp_path / "run", "task.kind=sdpo")
    file = write(tmp_path, config)
    code, child = run_command(tmp_path / "first", "profile", file, *STEPS)
    assert code == 0, child.err
    assert not (tmp_path / "run").exists()
    output = tmp_path / "run-profile"
    report = json.loads((output / "profile.json").read_text(encoding="utf-8"))
    check_consistent(report, config, workers=1)
    assert json.loads((output / "trace-rank-0.json").read_text(encoding="utf-8"))["traceEvents"]
    assert report["communication"]["share_of_traced_step"] < 0.05  # DeepSpeed reduces over a single rank, too
    for words in (
        "step p50",
        "step p95",
        "logical tokens/s",
        "groups/s",
        "mfu",
        "peak",
        "headroom",
        "slowest rank",
        "random tokens",
    ):
        assert words in child.out

    # The Llama of conftest.py: 2 layers of q 32*32, k and v 32*16, o 32*32, three of 32*64; LoRA of rank 4 on all seven.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    lora = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    expected = {"frozen": 2 * layer, "training": 2 * lora, "head": 320 * 32, "head_trains": False}
    assert report["compute"]["weights"] == expected
    assert report["compute"]["flops"] == (
        report["real"]["tokens"] * (4 * 2 * layer + 6 * 2 * lora) + report["compute"]["scored_rows"] * 4 * 320 * 32
    )

    old = tmp_path / "old.json"
    for factor, wanted, name in ((1e-3, 0, "slower"), (1e3, 1, "faster")):
        changed = {**report, "real": {**report["real"], "tokens_per_second": report["real"]["tokens_per_second"] * factor}}
        changed["real"]["step_seconds"] = {"p50": report["real"]["step_seconds"]["p50"] / factor}
        old.write_text(json.dumps(changed), encoding="utf-8")
        code, child = run_command(
            tmp_path / name, "profile", file, *STEPS, "profile.trace_ranks=[]", "--against", old, "--tolerance", "0.5"
        )
        assert code == wanted, child.err
        assert "tokens/s " in child.out and ("failed: tokens/s fell" in child.err) == bool(wanted)
    visible = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    assert visible == ["attempt", "log.txt", "metrics.jsonl", "profile.json", "progress.json", "reference"]


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_two_workers(stage: int, tmp_path: Path, tiny_config: Make) -> None:
    from rec_dist.config.schema import RunConfig
    from rec_dist.methods.registry import find_initial_weights
    from rec_dist.profiling.session import profile_worker
    from rec_dist.training.worker import TrainJob

    config = tiny_config(
        tmp_path / "run", f"cluster.zero_stage={stage}", *STEPS, "profile.trace_ranks=[1]", "train.max_tokens_per_micro_batch=160"
    )
    parsed = RunConfig.model_validate(config)
    (tmp_path / "run-profile").mkdir()
    job = TrainJob(parsed.model_dump(), str(tmp_path / "run-profile"), find_initial_weights(parsed))
    reports = run_workers(profile_worker, [job, job], tmp_path / "workers")
    assert reports[0] == reports[1]
    check_consistent(reports[0], config, workers=2)
    assert reports[0]["communication"]["share_of_traced_step"] > 0
    assert reports[0]["files"] == ["trace-rank-1.json"] and (tmp_path / "run-profile" / "trace-rank-1.json").is_file()


def test_a_recommender_on_ids_has_no_mfu(tmp_path: Path, tiny_config: Make) -> None:
    file = write(tmp_path, tiny_config(tmp_path / "run", "task.kind=sequential", "model.path=none"))
    code, child = run_command(tmp_path / "out", "profile", file, *STEPS)
    assert code == 0, child.err
    report = json.loads((tmp_path / "run-profile" / "profile.json").read_text(encoding="utf-8"))
    assert report["compute"]["mfu"] is None and "language models" in report["compute"]["why"]
    assert sum(report["real"]["shares"].values()) == pytest.approx(1.0)


def test_an_interrupted_profile_says_so_and_leaves_the_one_before_it(tmp_path: Path, tiny_config: Make) -> None:
    file, folder = write(tmp_path, tiny_config(tmp_path / "run")), tmp_path / "run-profile"
    folder.mkdir()
    for name in (".profile", "profile.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    child = start_command(tmp_path / "out", "profile", file, "profile.warmup_steps=100000")
    while not (folder / "progress.json").is_file() and child.process.is_alive():  # written after the first step
        time.sleep(0.05)
    assert child.process.pid is not None
    os.kill(child.process.pid, signal.SIGINT)
    assert child.wait() == 1
    assert child.err.splitlines()[-1].startswith("interrupted; ") and "Traceback" not in child.err
    assert (folder / "profile.json").read_text(encoding="utf-8") == "{}"


def test_an_interrupt_that_a_library_turns_into_another_exception_is_one(tmp_path: Path, tiny_config: Make) -> None:
    child = start(
        _main_interrupted_at_an_import, ["profile", str(write(tmp_path, tiny_config(tmp_path / "run")))], folder=tmp_path
    )
    assert child.wait() == 1
    assert child.err.splitlines() == ["interrupted; what was saved before is kept"]


def _main_interrupted_at_an_import(words: list[str]) -> int:
    """`rec-dist profile` with Ctrl-C while transformers imports, which hides it behind a ModuleNotFoundError."""
    from rec_dist.cli import main
    from rec_dist.commands import profile

    def find_initial_weights(config: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt as fault:
            raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from fault

    profile.find_initial_weights = find_initial_weights  # type: ignore[assignment]
    return main(words)


@pytest.mark.parametrize("command", ["profile", "train"])
def test_running_out_of_memory_says_what_to_turn(command: str, tmp_path: Path, tiny_config: Make) -> None:
    config = tiny_config(tmp_path / "run", *STEPS, "train.max_tokens_per_micro_batch=512", "cluster.zero_stage=2")
    code, child = _exhausted(tmp_path, command, write(tmp_path, config))
    assert code == 1, child.err
    last = child.err.splitlines()[-1]
    assert last.startswith("failed: out of memory on cpu")
    assert "train.max_tokens_per_micro_batch from 512 to 256 (half" in last and "model.activation_checkpointing=true" in last
    assert "Traceback" not in child.err


def _exhausted(folder: Path, command: str, file: Path) -> Any:

    child = start(_main_without_memory, [command, str(file)], folder=folder / "out")
    return child.wait(), child


def _main_without_memory(words: list[str]) -> int:
    """`rec-dist` in which every training pass asks for more memory than there is."""
    import torch

    from rec_dist.cli import main
    from rec_dist.engine.engine import Engine

    def forward(self: Engine, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    Engine.forward = forward  # type: ignore[method-assign]
    return main(words)


@pytest.mark.slow
def test_on_real_ray_workers(tmp_path: Path, tiny_config: Make) -> None:
    """20 s: two Ray Train workers under ZeRO-3, with cached references, through the command line."""
    config = tiny_config(tmp_path / "run", "task.kind=sdpo", "cluster.zero_stage=3", "train.max_tokens_per_micro_batch=256")
    config["cluster"] |= {"launcher": "ray", "num_workers": 2, "cpus_per_worker": 0.5}
    command = [sys.executable, "-m", "rec_dist", "profile", str(write(tmp_path, config)), *STEPS]
    outside = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    done = subprocess.run(command, capture_output=True, text=True, env=outside, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run-profile" / "profile.json").read_text(encoding="utf-8"))
    check_consistent(report, config, workers=2)
    assert report["communication"]["share_of_traced_step"] > 0
