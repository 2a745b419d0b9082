"""P2Rec through the real loop and the real command.

It is equal on any workers, stages and micro-batches, resumes exactly, and embeds exactly.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from p2rec_teacher import NUM_CATEGORIES, write_p2rec_teacher
from safetensors.torch import load_file
from worker_processes import run_command, start_command

from rec_dist.storage.checksums import parse_manifest, write_manifest

_SMALL = "train.max_tokens_per_micro_batch=90"  # two or three users a micro-batch


@pytest.fixture(scope="session")
def stage_one(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[str, ...]:
    """The keys of a run of stage 1."""
    from rec_dist.data.dataset.prepared_data import PreparedData

    folder = tmp_path_factory.mktemp("p2rec-teacher")
    write_p2rec_teacher(folder / "model", PreparedData.open(tiny_data))
    keys = ("task.kind=p2rec_reconstruct", f"task.p2rec.num_categories={NUM_CATEGORIES}", f"task.p2rec.teacher={folder}")
    return (*keys, "optimizer.lr=0.02", "train.epochs=3", "train.max_steps=12")


def saved(run: Any) -> dict[str, torch.Tensor]:
    """All that has trained."""
    files = [load_file(run.path / "model" / name) for name in ("adapter_model.safetensors", "preference_reader.safetensors")]
    return {name: value for file in files for name, value in file.items()}


def assert_near(run: Any, expected: Any) -> None:
    assert len(run.steps) == len(expected.steps)
    for row, wanted in zip(run.steps, expected.steps, strict=True):
        keys = wanted.keys() - {"event"}
        assert {key: row[key] for key in keys} == pytest.approx({key: wanted[key] for key in keys}, rel=2e-5, abs=1e-6)
    for name, value in saved(expected).items():
        torch.testing.assert_close(saved(run)[name], value, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_it_learns_what_users_prefer(trainer: Any, stage_one: tuple[str, ...]) -> None:
    """The loss falls below that of a constant guess, which the log states. 15 steps of 8 are 2 whole epochs of 60 users."""
    run = trainer.once(*stage_one, "task.p2rec.pooling=mean", "optimizer.lr=0.01", "train.max_steps=240", "train.epochs=32")
    guess = float(run.log.split("said of each of them, has loss ")[1].split()[0])
    losses = [row["loss"] for row in run.steps]
    assert np.mean(losses[:15]) > 0.9 * guess
    assert np.mean(losses[-15:]) < 0.75 * guess
    assert all(0 < row["preference/distance"] < 1 for row in run.steps)
    assert (run.steps[0]["groups"], len(run.steps)) == (8, 240)


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        (1, (_SMALL,)),
        pytest.param(2, (_SMALL,), marks=pytest.mark.slow),
        pytest.param(2, ("cluster.zero_stage=2", _SMALL), marks=pytest.mark.slow),
        (2, ("cluster.zero_stage=3", _SMALL)),
    ],
)
def test_workers_stages_and_micro_batches_change_nothing(
    trainer: Any, stage_one: tuple[str, ...], workers: int, changes: tuple[str, ...]
) -> None:
    assert_near(trainer.once(*stage_one, *changes, workers=workers), trainer.once(*stage_one))


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(trainer: Any, stage_one: tuple[str, ...], workers: int, stage: int) -> None:
    changes = (*stage_one, f"cluster.zero_stage={stage}", _SMALL)
    run_dir = trainer.new_dir()
    trainer.train(run_dir, *changes, workers=workers, stop_after=5)
    state = load_file(run_dir / "checkpoints" / "step-00000005" / "state.safetensors")
    assert {"weight.linear.weight", "exp_avg.linear.bias"} <= state.keys()
    run, expected = trainer.train(run_dir, *changes, workers=workers), trainer.once(*changes, workers=workers)
    assert run.steps == expected.steps
    assert all(torch.equal(saved(run)[name], value) for name, value in saved(expected).items())


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_on_a_bfloat16_model_what_trains_is_float32(trainer: Any, stage_one: tuple[str, ...], workers: int, stage: int) -> None:
    changes = (*stage_one, f"cluster.zero_stage={stage}")
    run, exact = (trainer.once(*changes, *more, workers=workers) for more in (("model.dtype=bfloat16",), ()))
    assert {value.dtype for value in saved(run).values() if value.is_floating_point()} == {torch.float32}
    assert [row["loss"] for row in run.steps] == pytest.approx([row["loss"] for row in exact.steps], rel=0.05)


def table(folder: Path) -> np.ndarray:
    """The vectors. Arrow and safetensors must hold the same ones."""
    from rec_dist.data.artifacts.embeddings import read_embeddings

    manifest = json.loads((folder / "embeddings.json").read_text(encoding="utf-8"))
    values = np.concatenate(read_embeddings(folder, data_fingerprint=manifest["inputs"]["data"]))
    assert torch.equal(load_file(folder / "embeddings.safetensors")["embeddings"], torch.from_numpy(values))
    return values


def plain_vector(model_dir: Path, title: str) -> np.ndarray:
    """The decoder's last state after a prompt of one title, from plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(str(model_dir))(f"A user watched:\n- {title}\n-", return_tensors="pt").input_ids
    with torch.no_grad():
        return model.model(ids).last_hidden_state[0, -1].numpy()


def test_embedding_base_and_tuned(trainer: Any, stage_one: tuple[str, ...], tiny_model_dir: Path, tmp_path: Path) -> None:
    from rec_dist.data.dataset.prepared_data import PreparedData

    run = trainer.once(*stage_one)
    for name, target in (("raw", run.path / "config.yaml"), ("tuned", run.path)):
        code, child = run_command(tmp_path, "embed", target, tmp_path / name, "train.max_tokens_per_micro_batch=60")
        assert code == 0, child.err
    raw, tuned = table(tmp_path / "raw"), table(tmp_path / "tuned")
    assert raw.shape == tuned.shape == (80, 32)
    assert np.abs(raw - tuned).max() > 1e-2
    config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    titles = PreparedData.open(config["data"]["path"]).titles
    for item in (0, 41, 79):
        np.testing.assert_allclose(raw[item], plain_vector(tiny_model_dir, titles[item]), atol=1e-4)
    code, child = run_command(tmp_path, "export", run.path, "--out", tmp_path / "merged", "--format", "merged")
    assert code == 0, child.err
    np.testing.assert_allclose(tuned[7], plain_vector(tmp_path / "merged", titles[7]), atol=1e-4)
    # Other micro-batches give the same vectors except for rounding. A second call does nothing. Another model is rejected.
    code, child = run_command(tmp_path, "embed", run.path, tmp_path / "wide", "train.max_tokens_per_micro_batch=2048")
    np.testing.assert_allclose(table(tmp_path / "wide"), tuned, atol=1e-5)
    code, child = run_command(tmp_path, "embed", run.path, tmp_path / "wide", "train.max_tokens_per_micro_batch=60")
    assert (code, "nothing to do" in child.err) == (0, True)
    code, child = run_command(tmp_path, "embed", run.path / "config.yaml", tmp_path / "wide")
    assert (code, "(different: adapter)" in child.err) == (2, True), child.err


def test_a_killed_embedding_goes_on(trainer: Any, stage_one: tuple[str, ...], tmp_path: Path) -> None:
    run = trainer.once(*stage_one)
    # one item a micro-batch, eight a part
    words = (
        "embed",
        run.path,
        tmp_path / "killed",
        "train.max_tokens_per_micro_batch=20",
    )
    child = start_command(tmp_path / "first", *words)
    parts, deadline = tmp_path / "killed" / "parts", time.monotonic() + 120
    while len(list(parts.glob("part-*.safetensors"))) < 2:
        assert child.process.is_alive(), child.err
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.kill()
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.safetensors")}
    assert 2 <= len(before) < 10
    (parts / "part-000000.safetensors").write_bytes(b"damaged")
    code, again = run_command(tmp_path / "second", *words)
    assert code == 0, again.err
    assert f"{len(before) - 1} of 10 parts are there already" in again.err
    code, whole = run_command(tmp_path / "third", "embed", run.path, tmp_path / "whole", "train.max_tokens_per_micro_batch=20")
    assert code == 0, whole.err
    assert np.array_equal(table(tmp_path / "killed"), table(tmp_path / "whole"))
    assert not parts.exists()


def on_ray(*words: object) -> subprocess.CompletedProcess[str]:
    """`rec-dist embed WORDS` on Ray Data with one thread a worker, as the tests use."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "rec_dist", "embed", *map(str, words), "cluster.launcher=ray", "cluster.cpus_per_worker=1"]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=400, check=False)


@pytest.mark.slow
def test_two_ray_data_workers_write_what_one_process_writes(trainer: Any, stage_one: tuple[str, ...], tmp_path: Path) -> None:
    run = trainer.once(*stage_one)
    words = ("train.max_tokens_per_micro_batch=60",)
    code, child = run_command(tmp_path, "embed", run.path, tmp_path / "here", *words)
    assert code == 0, child.err
    done = on_ray(run.path, tmp_path / "ray", *words, "cluster.num_workers=2")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(table(tmp_path / "ray"), table(tmp_path / "here"))


@pytest.mark.slow
def test_what_a_ray_data_worker_refuses_is_one_line(trainer: Any, stage_one: tuple[str, ...], tmp_path: Path) -> None:
    """That nothing has trained the vectors is found when the model is loaded."""
    run = trainer.once(*stage_one)
    done = on_ray(run.path / "config.yaml", tmp_path / "ray", "prompt.num_virtual=4", "cluster.num_workers=1")
    lines = done.stderr.splitlines()
    assert (done.returncode, lines[-1].startswith("error: prompt.num_virtual (4)")) == (2, True), done.stderr
    assert not (tmp_path / "ray").exists()


@pytest.mark.slow
def test_recommenders_start_from_them_in_a_pipeline(
    trainer: Any, stage_one: tuple[str, ...], tiny_config: Any, tmp_path: Path
) -> None:
    """From a trained teacher through both stages to the table, twice; the second time does nothing."""
    sequential = ("task.kind=sequential", "task.sequential.width=8", "task.sequential.top_h=2", "evaluate.num_candidates=all")
    (tmp_path / "sasrec.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path / "random", *sequential)), encoding="utf-8")
    teacher = {"task.p2rec.teacher": str(tmp_path / "random")}
    keys = ("task.kind=p2rec_reconstruct", f"task.p2rec.num_categories={NUM_CATEGORIES}", teacher)
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path / "stage1", *keys)), encoding="utf-8")
    start = [f"train.run_dir={tmp_path / 'p2rec'}", f"task.sequential.init_embeddings={tmp_path / 'items'}"]
    stages = [
        {"name": "teacher", "do": "train", "target": "sasrec.yaml"},
        {"name": "stage 1", "do": "train", "target": "stage1.yaml"},
        {"name": "stage 2", "do": "embed", "target": str(tmp_path / "stage1"), "to": str(tmp_path / "items")},
        {"name": "train P2Rec", "do": "train", "target": "sasrec.yaml", "set": start},
        {"name": "random", "do": "evaluate", "target": str(tmp_path / "random")},
        {"name": "P2Rec", "do": "evaluate", "target": str(tmp_path / "p2rec")},
    ]
    section = {"title": "Tiny", "run_dir": str(tmp_path / "report"), "stages": stages, "pairs": [["P2Rec", "random"]]}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"pipeline": {**section, "metrics": ["hr@10", "ndcg@10"]}}), encoding="utf-8")
    code, child = run_command(tmp_path / "first", "run", path)
    assert code == 0, child.err[-3000:]
    written = (tmp_path / "report" / "table.txt").read_text(encoding="utf-8")
    assert written.count("P2Rec - random") == 2, "a paired difference in both metrics"
    code, child = run_command(tmp_path / "second", "run", path)
    assert (code, child.err.count("nothing to do")) == (0, 6), child.err
    path = tmp_path / "items" / "embeddings.json"
    write_manifest(path, 2, {**parse_manifest(path.read_bytes(), 2), "seconds": 0})
    code, child = run_command(tmp_path / "third", "train", tmp_path / "sasrec.yaml", *start)
    assert (code, "was started from other data" in child.err) == (2, True), child.err
