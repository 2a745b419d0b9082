"""Resume is exact: a run that is stopped, killed or loses its newest checkpoint ends bit for bit like an undisturbed one.

On another number of workers or another ZeRO stage, sums are taken in another order, and the run ends within 1e-5.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from worker_processes import WorkerFailedError, run_command, start_command

from rec_dist.storage.checksums import write_manifest

_SIX = (
    "train.max_steps=6",
    "task.kind=sdpo",
    "train.global_batch_size=4",
    "optimizer.schedule=cosine",
    "optimizer.warmup_steps=2",
)
_FULL = ("train.max_steps=6", "task.kind=sft", "train.global_batch_size=4", "adapter.kind=none", "optimizer.lr=1e-3")
_CASES = {
    "one worker, ZeRO-0": (1, (*_SIX, "cluster.zero_stage=0")),
    "one worker, ZeRO-3": (1, (*_SIX, "cluster.zero_stage=3")),
    "two workers, ZeRO-0": (2, (*_SIX, "cluster.zero_stage=0", "train.max_tokens_per_micro_batch=200")),
    "two workers, ZeRO-3": (2, (*_SIX, "cluster.zero_stage=3", "train.max_tokens_per_micro_batch=200")),
    "dropout": (1, (*_SIX, "adapter.dropout=0.3", "train.max_tokens_per_micro_batch=200")),
    "dropout, two workers": (2, (*_SIX, "adapter.dropout=0.3", "train.max_tokens_per_micro_batch=200")),
    "online reference": (1, (*_SIX, "task.reference=online")),
    "the catalogue's softmax, two workers, ZeRO-3": (
        2,
        (*_SIX, "task.kind=msl", "cluster.zero_stage=3", "train.max_tokens_per_micro_batch=200"),
    ),
    "full fine-tuning": (1, (*_FULL, "cluster.zero_stage=0")),
    "full fine-tuning, two workers, ZeRO-3": (2, (*_FULL, "cluster.zero_stage=3")),
}
_LESS_OFTEN = (  # two workers at ZeRO-3 with an adapter, and a state of many files, hold the same quickly
    "one worker, ZeRO-3",
    "the catalogue's softmax, two workers, ZeRO-3",
    "full fine-tuning, two workers, ZeRO-3",
)


def assert_same(run: Any, expected: Any) -> None:
    """Compares bit for bit: every weight, every number of every step."""
    assert run.steps == expected.steps
    assert run.weights.keys() == expected.weights.keys()
    assert all(torch.equal(run.weights[name], value) for name, value in expected.weights.items())


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def flip_byte(folder: Path) -> Path:
    """Flips one bit in the middle of the largest file below `folder`."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in _LESS_OFTEN else ()) for case in _CASES],
)
def test_stop_and_go_on(trainer: Any, case: str) -> None:
    workers, changes = _CASES[case]
    expected = trainer.once(*changes, workers=workers)
    run_dir = trainer.new_dir()
    half = trainer.train(run_dir, *changes, workers=workers, stop_after=3)
    assert [row["step"] for row in half.steps] == [1, 2, 3]
    assert not (run_dir / "model").exists()
    run = trainer.train(run_dir, *changes, workers=workers)
    assert [row["step"] for row in run.rows if row["event"] == "resume"] == [3]
    assert_same(run, expected)


def test_dropout_has_an_effect(trainer: Any) -> None:
    """Otherwise the two dropout cases above would test nothing."""
    plain, dropped = trainer.once(*_SIX, "cluster.zero_stage=0"), trainer.once(*_CASES["dropout"][1])
    assert plain.steps[-1]["loss"] != pytest.approx(dropped.steps[-1]["loss"], rel=1e-4)


def test_bad_checkpoints_are_walked_past(trainer: Any) -> None:
    """The newest has a flipped bit and the one before no commit marker: the run continues from the third and says so."""
    workers, changes = _CASES["two workers, ZeRO-0"]
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *changes, workers=workers, stop_after=5)
    newest, before, oldest = (run_dir / "checkpoints" / f"step-{step:08d}" for step in (5, 4, 2))
    assert oldest.is_dir()
    damaged = flip_byte(newest)
    (before / "COMMITTED").unlink()
    trainer.train(run_dir, *changes, workers=workers, stop_after=3)
    # Skipped checkpoints are set aside. Otherwise they would count for checkpoint.keep and push out the good one just written.
    folders = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert {"step-00000003", "step-00000004.bad", "step-00000005.bad"} <= folders
    run = trainer.train(run_dir, *changes, workers=workers)
    warnings = [line for line in run.log.splitlines() if "WARNING" in line]
    assert len(warnings) == 2
    assert damaged.name in warnings[0]
    assert "no commit marker" in warnings[1]
    assert [row["step"] for row in run.rows if row["event"] == "resume"] == [2, 3]
    assert_same(run, trainer.once(*changes, workers=workers))


def test_all_checkpoints_bad_starts_anew(trainer: Any) -> None:
    changes = _CASES["one worker, ZeRO-0"][1]
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *changes, stop_after=3)
    for folder in (run_dir / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{", encoding="utf-8")
    run = trainer.train(run_dir, *changes)
    assert run.log.count("WARNING") == 2
    assert_same(run, trainer.once(*changes))


_ADAPTER = (*_SIX, "adapter.rank=32")  # 32 * width is more than ZeRO-3 keeps whole on every rank, so both kinds occur
_SMALL = "train.max_tokens_per_micro_batch=200"
# (workers, stage) of three attempts, after 2, 4 and 6 steps.
_WAYS = {
    "fewer and more": ((2, 3), (1, 0), (2, 2)),
    "the other way": ((2, 2), (1, 0), (2, 3)),
    "stages alone": ((2, 0), (2, 3), (2, 1)),
}


def assert_near(run: Any, expected: Any) -> None:
    """Losses, norms and every weight agree within 1e-5, relative."""
    assert [row["step"] for row in run.steps] == [row["step"] for row in expected.steps]
    for row, wanted in zip(run.steps, expected.steps, strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((wanted["loss"], wanted["grad_norm"]), rel=1e-5)
    assert run.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert float((run.weights[name] - value).norm()) <= 1e-5 * float(value.norm()), name


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        pytest.param(
            changes, way, id=f"{name}, {way}", marks=pytest.mark.slow if (name, way) != ("adapter", "fewer and more") else ()
        )
        for name, changes, ways in (("adapter", _ADAPTER, _WAYS), ("full fine-tuning", _FULL, ("fewer and more",)))
        for way in ways
    ],
)
def test_on_other_workers_and_stages(trainer: Any, changes: tuple[str, ...], way: str) -> None:
    expected = trainer.once(*changes, "cluster.zero_stage=0")
    run_dir = trainer.new_dir()
    for (workers, stage), stop in zip(_WAYS[way], (2, 4, None), strict=True):
        run = trainer.train(run_dir, *changes, _SMALL, f"cluster.zero_stage={stage}", workers=workers, stop_after=stop)
    assert [row["step"] for row in run.rows if row["event"] == "resume"] == [2, 4]
    assert_near(run, expected)


def test_a_checkpoint_of_an_adapter_is_one_small_file_without_pickles(trainer: Any) -> None:
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *_CASES["two workers, ZeRO-3"][1], workers=2, stop_after=3)
    folder = run_dir / "checkpoints" / "step-00000003"
    assert {path.name for path in folder.iterdir()} == {"state.safetensors", "manifest.json", "COMMITTED"}
    state = load_file(folder / "state.safetensors")
    weights = {name.removeprefix("weight.") for name in state if name.startswith("weight.")}
    assert weights and all("lora" in name for name in weights)
    assert set(state) == {"step", *(f"{kind}.{name}" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in weights)}
    assert float(state["step"]) == 3


def small_files_worker(world: Any, job: Any) -> Any:
    """train_worker that treats its states as large: many files, some with several tensors and some with one."""
    from rec_dist.checkpoint import state_files
    from rec_dist.training.worker import train_worker

    state_files.MAX_FILE_BYTES = 3000
    return train_worker(world, job)


def test_a_large_state_is_many_files_written_by_all_ranks_and_read_anywhere(trainer: Any) -> None:
    """The files hold what one file would hold, whoever wrote them, and another number of workers resumes from them."""
    changes = (*_FULL, _SMALL)
    states = []
    for workers, stage in ((1, 0), (2, 3)):
        run_dir = trainer.new_dir()
        here = (*changes, f"cluster.zero_stage={stage}")
        trainer.train(run_dir, *here, workers=workers, stop_after=2, worker=small_files_worker)
        folder = run_dir / "checkpoints" / "step-00000002"
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(names) > 10
        assert names[0] == f"state-00001-of-{len(names):05d}.safetensors"
        tensors = [load_file(folder / name) for name in names]
        assert max(len(part) for part in tensors) > 1
        states.append({name: value for part in tensors for name, value in part.items()})
        assert len(states[-1]) == sum(len(part) for part in tensors)
        run = trainer.train(run_dir, *changes, "cluster.zero_stage=2", workers=3 - workers)
        assert_near(run, trainer.once(*_FULL, "cluster.zero_stage=0"))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert float((states[1][name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-12, name


def test_another_base_model_is_refused(trainer: Any) -> None:
    changes = _CASES["one worker, ZeRO-0"][1]
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *changes, stop_after=3)
    path = run_dir / "checkpoints" / "step-00000003" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    version, _ = manifest.pop("format_version"), manifest.pop("checksum")
    write_manifest(path, version, {**manifest, "base": "0123"})
    with pytest.raises(WorkerFailedError, match="base model of fingerprint 0123") as caught:
        trainer.train(run_dir, *changes)
    assert caught.value.kind == "UserError"


def test_another_zero_stage_by_the_command(trainer: Any, tmp_path: Path) -> None:
    changes = _CASES["one worker, ZeRO-0"][1]
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *changes, stop_after=3)
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *changes))
    code, child = run_command(tmp_path, "train", config, "cluster.zero_stage=3", "checkpoint.every_steps=100")
    assert code == 0, child.err
    run = type(trainer.once(*changes))(run_dir)
    assert "from 1 worker(s) at ZeRO stage 0 to 1 at stage 3" in run.log
    assert_near(run, trainer.once(*changes))


_LONG = ("train.max_steps=30", "task.kind=sdpo", "train.max_tokens_per_micro_batch=120", "checkpoint.every_steps=3")


def wait_for_step(run_dir: Path, step: int, alive: Callable[[], bool]) -> None:
    """Waits until metrics.jsonl has the row of `step`."""
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.is_file() and f'"step": {step},' in metrics.read_text(encoding="utf-8"):
            return
        assert alive(), "it ended before that step"
        time.sleep(0.002)
    raise TimeoutError(f"{run_dir} did not come to step {step}")


@pytest.mark.parametrize(
    "more",
    [(), pytest.param(("checkpoint.asynchronous=true", "checkpoint.every_steps=1"), marks=pytest.mark.slow)],
    ids=["", "in the background"],
)
def test_killed_command_goes_on(trainer: Any, tmp_path: Path, more: tuple[str, ...]) -> None:
    """SIGKILL between two checkpoints, twice, or while one is being written, as is mostly the case."""
    run_dir = trainer.new_dir()
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *_LONG, *more))
    for step in (5, 11):
        child = start_command(tmp_path, "train", config)
        wait_for_step(run_dir, step, child.process.is_alive)
        child.kill()
        assert not (run_dir / "finished.json").exists()
    code, _ = run_command(tmp_path, "train", config)
    assert code == 0
    run = type(trainer.once(*_LONG))(run_dir)
    resumed = [row["step"] for row in run.rows if row["event"] == "resume"]
    assert len(resumed) == 2
    assert resumed[0] >= 3
    assert resumed[1] >= 9
    assert not list((run_dir / "checkpoints").glob("*.tmp"))
    assert_same(run, trainer.once(*_LONG))


def test_terminated_command_saves_and_exits_75(trainer: Any, tmp_path: Path) -> None:
    run_dir = trainer.new_dir()
    config = write_config(tmp_path / "config.yaml", trainer.config(run_dir, *_LONG, "checkpoint.every_steps=100"))
    child = start_command(tmp_path, "train", config)
    wait_for_step(run_dir, 4, child.process.is_alive)
    child.process.terminate()
    assert child.wait() == 75
    assert "run the same command" in child.err
    assert "Traceback" not in child.err
    assert not (run_dir / "stop").exists()
    code, child = run_command(tmp_path, "train", config)
    assert code == 0
    assert_same(type(trainer.once(*_LONG))(run_dir), trainer.once(*_LONG))
    code, child = run_command(tmp_path, "train", config)
    assert (code, "nothing to do" in child.err) == (0, True)


@pytest.mark.slow
def test_one_killed_worker_of_two(trainer: Any) -> None:
    changes = (*_LONG, "train.max_steps=12")
    run_dir = trainer.new_dir()
    children = trainer.start(run_dir, *changes, workers=2)
    wait_for_step(run_dir, 5, children[0].process.is_alive)
    for child in reversed(children):
        child.kill()
    run = trainer.train(run_dir, *changes, workers=2)
    assert next(row["step"] for row in run.rows if row["event"] == "resume") >= 3
    assert_same(run, trainer.once(*changes, workers=2))
