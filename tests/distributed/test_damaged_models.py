"""Truncated or changed files of a finished run's model/: one line names the file and the way out, and nothing is left behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from worker_processes import Child, run_command

from rec_dist.commands.verify import verify
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights

_WAY_OUT = "remove finished.json of that run and train it again"
_STAGES = {
    "adapter": ("task.kind=sft",),
    "vectors": (
        "task.kind=delrec_distill",
        "adapter.kind=soft_prompt",
        "prompt.num_virtual=4",
        "task.delrec.top_h=3",
        "task.delrec.teacher=random",
        "negatives.num=5",
        "train.global_batch_size=4",
        "train.max_tokens_per_micro_batch=4096",
        "train.max_steps=1",
    ),
    "model": ("task.kind=sft", "adapter.kind=none", "train.max_steps=1"),
    "recommender": ("task.kind=sequential", "adapter.kind=none", "task.sequential.width=8", "train.max_steps=1"),
}


def refused(code: int, child: Child, *names: str) -> None:
    lines = child.err.splitlines()
    assert code == 2, child.err
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in child.err
    assert not [name for name in names if name not in lines[-1]], lines[-1]


@pytest.mark.parametrize(
    ("stage", "name", "commands", "names"),
    [
        ("adapter", "adapter_model.safetensors", ("evaluate", "embed", "export", "train"), ("adapter_model", _WAY_OUT)),
        ("adapter", "adapter_config.json", ("evaluate", "embed", "export", "train"), ("adapter_config", _WAY_OUT)),
        ("adapter", "prompt.json", ("evaluate", "embed", "export"), ("prompt.json", _WAY_OUT)),
        ("vectors", "soft_prompt.safetensors", ("evaluate", "embed", "export", "train"), ("soft_prompt", _WAY_OUT)),
        ("model", "model.safetensors", ("evaluate", "embed", "train"), ("model.safetensors cannot be read", "header")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_cut_short(
    trainer: Any, tmp_path: Path, stage: str, name: str, commands: tuple[str, ...], names: tuple[str, ...]
) -> None:
    """This holds without the checksums of files.json, too."""
    run, made = tmp_path / "run", tmp_path / "made"
    shutil.copytree(trainer.once(*_STAGES[stage]).path, run)
    (run / "model" / "files.json").unlink()
    path = run / "model" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    config = trainer.config(made, *_STAGES[stage], {"train.init_from": str(run)})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    words = {
        "evaluate": (run, "evaluate.max_users=3"),
        "embed": (run, made),
        "export": (run, "--out", made),
        "train": (tmp_path / "config.yaml",),
    }
    before = sorted(tmp_path.iterdir())
    for command in commands:
        refused(*run_command(tmp_path.parent / f"{tmp_path.name}-{command}", command, *words[command]), *names)
        assert sorted(tmp_path.iterdir()) == before, command
    assert not (run / "evaluation.json").exists()


def test_a_recommender_with_damaged_files(trainer: Any, tmp_path: Path) -> None:
    made = trainer.once(*_STAGES["recommender"])
    for name in ("sequential.json", "model.safetensors"):
        run = tmp_path / f"with-{name}"
        shutil.copytree(made.path, run)
        path = run / "model" / name
        path.write_bytes(path.read_bytes()[:40])
        (run / "model" / "files.json").unlink()
        refused(*run_command(tmp_path / "out", "evaluate", run), "sequential", _WAY_OUT)


def flip(path: Path) -> None:
    """Flips one bit of the last byte; in a safetensors file that is a weight, which still loads."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("stage", "name", "commands"),
    [
        ("adapter", "adapter_model.safetensors", ("evaluate", "embed", "export", "train", "verify")),
        ("adapter", "items.arrow", ("evaluate", "export")),
        ("vectors", "soft_prompt.safetensors", ("evaluate", "export", "train")),
        ("model", "model.safetensors", ("evaluate", "embed", "train", "verify")),
        ("recommender", "model.safetensors", ("evaluate", "verify")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_flipped_bit(trainer: Any, tmp_path: Path, stage: str, name: str, commands: tuple[str, ...]) -> None:
    run, made = tmp_path / "run", tmp_path / "made"
    shutil.copytree(trainer.once(*_STAGES[stage]).path, run)
    config = trainer.config(made, *_STAGES[stage], {"train.init_from": str(run)})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    words = {
        "evaluate": (run, "evaluate.max_users=3"),
        "embed": (run, made),
        "export": (run, "--out", made),
        "train": (tmp_path / "config.yaml",),
        "verify": (run,),
    }
    code, child = run_command(tmp_path.parent / f"{tmp_path.name}-whole", "verify", run)
    assert (code, "and model/ whole" in child.err) == (0, True), child.err
    flip(run / "model" / name)
    before = sorted(tmp_path.iterdir())
    for command in commands:
        said = run_command(tmp_path.parent / f"{tmp_path.name}-{command}", command, *words[command])
        refused(*said, name, "has changed since it was written", _WAY_OUT)
        assert sorted(tmp_path.iterdir()) == before, command
    assert not (run / "evaluation.json").exists()


def test_a_flipped_bit_under_an_adapter(trainer: Any, tmp_path: Path) -> None:
    """The model under an adapter belongs to a run itself. A model without recorded checksums is used as it is."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(trainer.once(*_STAGES["model"]).path, base)
    config = trainer.config(run, "task.kind=sft", "train.max_steps=1", {"train.init_from": str(base)})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    code, child = run_command(tmp_path / "out", "train", tmp_path / "config.yaml")
    assert code == 0, child.err
    tokenizer = base / "model" / "tokenizer.json"  # not a weight, so that the base is still found by its fingerprint
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    for command, words in (("evaluate", (run, "evaluate.max_users=3")), ("export", (run, "--out", tmp_path / "served"))):
        refused(*run_command(tmp_path / command, command, *words), str(base), "tokenizer.json has", "bytes, not", _WAY_OUT)
    (base / "model" / "files.json").unlink()
    code, child = run_command(tmp_path / "out", "evaluate", run, "evaluate.max_users=3")
    assert code == 0, child.err


def test_the_way_out_writes_the_same_model_again(trainer: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(trainer.config(run, "task.kind=sft")), encoding="utf-8")
    code, child = run_command(tmp_path / "first", "train", tmp_path / "config.yaml")
    assert code == 0, child.err
    path = run / "model" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    (run / "finished.json").unlink()
    code, child = run_command(tmp_path / "again", "train", tmp_path / "config.yaml")
    assert code == 0, child.err
    assert path.read_bytes() == whole


def test_vectors_that_are_not_finite_are_not_written(tiny_config: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Only one token of one title is damaged, so that the probe at the start, which uses other titles, does not find it."""
    from transformers import AutoTokenizer

    from rec_dist.data.dataset.prepared_data import PreparedData

    config = tiny_config(tmp_path / "run")
    titles = PreparedData.open(config["data"]["path"]).titles
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    probed = {(number * 7919 + 13) % 319 for number in range(64)}  # in the form that models.encoder.check_alone takes
    token = next(token for item in range(8, 80) for token in tokenizer(f" {titles[item]}").input_ids if token not in probed)
    first = next(item for item in range(80) if token in tokenizer(f" {titles[item]}").input_ids)
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config["model"]["path"] = str(model)
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    code, child = run_command(tmp_path / "out", "embed", tmp_path / "config.yaml", tmp_path / "items")
    refused(code, child, f"the state after {titles[first]!r} (item {first}) is not finite", "model.dtype=float32")
    assert not (tmp_path / "items").exists()


def test_an_export_is_a_folder_or_nothing(trainer: Any, tmp_path: Path) -> None:
    run = trainer.once("task.kind=sft")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    refused(
        *run_command(tmp_path / "out", "export", run.path, "--out", tmp_path / "file" / "served"),
        "--out (",
        "lies below",
        "choose another folder",
    )
    refused(
        *run_command(tmp_path / "out", "export", run.path, "--out", "/proc/no/served"),
        "--out (/proc/no/served)",
        "cannot be written",
    )
    own = tmp_path / "served.tmp"  # a folder of the user's, under any name
    own.mkdir()
    (own / "thesis.txt").write_text("x", encoding="utf-8")
    code, child = run_command(tmp_path / "out", "export", run.path, "--format", "merged", "--out", tmp_path / "served")
    assert code == 0, child.err
    assert (own / "thesis.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "served", "served.tmp"]
    verify(str(tmp_path / "served"))
    flip(tmp_path / "served" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors has changed since it was written"):
        InitialWeights(tmp_path / "served").check_model()  # as every command that reads model.path does
