"""model.path as a Hub id, with a hub on loopback: what is downloaded, what is rejected, a run from it, and the same offline."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import TOKEN, Hub, environment, serving

from rec_dist.models.hub import Snapshot, is_hub_id, snapshot_of

RESOLVE = """
import json, sys
from rec_dist.errors import UserError
from rec_dist.models.pretrained import config_folder, resolve_model
answers = []
for name, revision, whole in json.loads(sys.argv[1]):
    try:
        answers.append([True, str((resolve_model if whole else config_folder)(name, revision))])
    except UserError as fault:
        answers.append([False, str(fault)])
print(json.dumps(answers))
"""
OTHER_FILES = ("README.md", "pytorch_model.bin", "consolidated.safetensors", "modeling_tiny.py", "onnx/model.safetensors")


@pytest.fixture
def hub(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Hub]:
    """tiny/llama, with files beside the model that nobody needs, and a gated, a private and an old-fashioned model."""
    folder = tmp_path / "served" / "llama"
    shutil.copytree(tiny_model_dir, folder)
    for name in OTHER_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for us")
    old = tmp_path / "served" / "old"
    shutil.copytree(folder, old)
    (old / "model.safetensors").unlink()
    with serving() as served:
        served.add("tiny/llama", folder, "v1.0", "pr/7")
        served.add("tiny/gated", folder)
        served.gated.add("tiny/gated")
        served.add("tiny/private", folder)
        served.private.add("tiny/private")
        served.add("tiny/old", old)
        yield served


def resolve(variables: dict[str, str], *wanted: tuple[str, str | None, bool]) -> list[tuple[bool, str]]:
    """For each (model.path, model.revision, with weights): whether there is such a model, and its folder or the message."""
    command = [sys.executable, "-c", RESOLVE, json.dumps(wanted)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [(bool(good), text) for good, text in json.loads(done.stdout.splitlines()[-1])]


def test_what_is_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name") and is_hub_id("meta-llama/Llama-3.2-1B")
    for path in ("name", "./org/name", "/org/name", "~/name", "a/b/c", "s3://a/b", "org/", "smollm2-135m-instruct"):
        assert not is_hub_id(path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id("org/name")
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / ("a1" * 20)
    assert snapshot_of(folder) == Snapshot("org/name", "a1" * 20)
    assert snapshot_of(folder.parent / "main") is None and snapshot_of(tmp_path) is None


def test_what_is_fetched_and_what_is_not(hub: Hub, tmp_path: Path) -> None:
    (commit, folder) = hub.repositories["tiny/llama"]["main"]
    variables = environment(hub.endpoint, tmp_path / "home")
    ((good, text),) = resolve(variables, ("tiny/llama", None, False))
    assert good and hub.fetched() == {"config.json"}  # what `plan` needs
    ((good, text),) = resolve(variables, ("tiny/llama", None, True))
    assert good, text
    assert Path(text).is_relative_to(tmp_path / "home") and snapshot_of(Path(text)) == Snapshot("tiny/llama", commit)
    wanted = {path.name for path in folder.iterdir() if path.is_file()} - set(OTHER_FILES)
    assert hub.fetched() == wanted >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in Path(text).iterdir()} == wanted
    hub.requests.clear()
    for good, text in resolve(
        variables, ("tiny/llama", "v1.0", True), ("tiny/llama", commit, True), ("tiny/llama", "pr/7", True)
    ):
        assert good and snapshot_of(Path(text)) == Snapshot("tiny/llama", commit)
    assert not hub.fetched()
    answers = resolve({**variables, "HF_HUB_OFFLINE": "1"}, ("tiny/llama", None, True), ("tiny/llama", "v1.0", True))
    assert all(good for good, _ in answers), answers
    hub.requests.clear()
    resolve({**variables, "HF_HUB_OFFLINE": "1"}, ("tiny/llama", commit, True))
    assert not hub.requests


def test_what_cannot_be_had_is_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    variables = environment(hub.endpoint, tmp_path / "home")
    cases: list[tuple[tuple[str, str | None, bool], tuple[str, ...]]] = [
        (("tiny/nowhere", None, True), ("model.path (tiny/nowhere)", "no existing folder", hub.endpoint, "HF_TOKEN")),
        (("tiny/llama", "v9", True), ("model.revision (v9)", "tiny/llama", "leave it out")),
        (("tiny/llama", "f" * 40, True), (f"model.revision ({'f' * 40})", "leave it out")),
        (("tiny/gated", None, True), ("model.path (tiny/gated)", "gated", f"{hub.endpoint}/tiny/gated", "HF_TOKEN")),
        (("tiny/private", None, True), ("model.path (tiny/private)", "HF_TOKEN")),
        (("tiny/old", None, True), ("model.path (tiny/old)", "no model.safetensors", "saved as safetensors")),
        (("smollm2-135m-instruct", "v1", True), ("model.revision (v1)", "leave it out")),
        (("smollm2-135m-instruct", "v1", False), ("model.revision (v1)", "leave it out")),
        (("nowhere", None, True), ("model.path (nowhere)", "org/name", "smollm2-135m-instruct")),
        (("tiny/llama.", None, True), ("model.path (tiny/llama.)", "no id that the Hub allows", "check the name")),
        (("tiny/nowhere", None, False), ("model.path (tiny/nowhere)", "HF_TOKEN")),
    ]
    for (good, text), (_, words) in zip(resolve(variables, *[case for case, _ in cases]), cases, strict=True):
        assert not good and "\n" not in text and all(word in text for word in words), text
    ((good, text),) = resolve({**variables, "HF_TOKEN": TOKEN}, ("tiny/private", None, True))
    assert good and TOKEN not in text


def test_offline_and_out_of_reach(hub: Hub, tmp_path: Path) -> None:
    offline = environment(hub.endpoint, tmp_path / "home", HF_HUB_OFFLINE="1")
    wanted: list[tuple[str, str | None, bool]] = [("tiny/llama", None, True), ("tiny/llama", "v1.0", True)]
    (plain, revised) = resolve(offline, *wanted)
    assert not plain[0] and not revised[0] and not hub.requests
    for word in ("model.path (tiny/llama)", "no existing folder", "HF_HUB_OFFLINE", "unset", "HF_HOME", str(tmp_path / "home")):
        assert word in plain[1] and "\n" not in plain[1]
    assert "model.revision (v1.0)" in revised[1]
    unreachable = environment("http://127.0.0.1:9", tmp_path / "home")  # nobody listens there
    ((good, text),) = resolve(unreachable, ("tiny/llama", None, True))
    assert not good and "http://127.0.0.1:9" in text and "HF_ENDPOINT" in text and "network" in text and "\n" not in text

    online = environment(hub.endpoint, tmp_path / "home")
    assert resolve(online, ("tiny/llama", None, False))[0][0]
    ((good, text),) = resolve(offline, ("tiny/llama", None, True))  # the configuration alone is not a model
    assert not good and "HF_HUB_OFFLINE" in text
    assert resolve(online, ("tiny/llama", None, True))[0][0]
    assert resolve(unreachable, ("tiny/llama", None, True))[0][0]


def rec_dist(variables: dict[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "rec_dist", *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_from_the_hub_and_offline_again(hub: Hub, tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    """The run trains from the hub and evaluates from the cache. It names the commit; the adapter names its base model's id."""
    run, file = tmp_path / "run", tmp_path / "config.yaml"
    config = tiny_config(run, "model.path=tiny/llama", "model.revision=v1.0", "train.max_steps=1", "evaluate.max_users=4")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    variables = environment(hub.endpoint, tmp_path / "home")
    commit = hub.repositories["tiny/llama"]["v1.0"][0]
    rec_dist(variables, "train", str(file))
    described = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert described["hub"] == {"repository": "tiny/llama", "commit": commit}
    assert "tiny/llama" in (run / "config.yaml").read_text(encoding="utf-8")
    adapter = json.loads((run / "model" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("tiny/llama", commit)

    hub.requests.clear()
    offline = {**variables, "HF_HUB_OFFLINE": "1"}
    rec_dist(offline, "evaluate", str(run))
    assert not hub.requests and (run / "evaluation.json").is_file()


def test_a_folder_of_another_node_is_fetched_on_this_one(hub: Hub, tmp_path: Path) -> None:
    commit = hub.repositories["tiny/llama"]["main"][0]
    elsewhere = tmp_path / "elsewhere" / "hub" / "models--tiny--llama" / "snapshots" / commit
    code = (
        f"from pathlib import Path; from rec_dist.models.hub import on_this_node; print(on_this_node(Path({str(elsewhere)!r})))"
    )
    variables = environment(hub.endpoint, tmp_path / "node")
    workers = [  # all of one node at once
        subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], printed
    assert {Path(out.strip()) for out, _ in printed} == {tmp_path / "node" / "hub" / "models--tiny--llama" / "snapshots" / commit}
    downloads = [line for line in hub.requests if line.startswith("GET") and line.endswith("/model.safetensors")]
    assert len(downloads) == 1


LOAD = """
import sys
from pathlib import Path
import torch
from rec_dist.data.prompts.tokens import load_tokenizer
from rec_dist.models.architecture import count_parameters
from rec_dist.models.language import LoraSpec, add_lora, load_language_model
from rec_dist.models.merge import write_merged_model
base, folder = Path(sys.argv[1]), Path(sys.argv[2])
load_tokenizer(base)
spec = LoraSpec(2, 4.0, 0.0, "all-linear")
count_parameters(base, spec)
model = add_lora(load_language_model(base, dtype=torch.float32), spec, seed=0, weights=None, keep_reference=False)
model.peft_config["default"].save_pretrained(str(folder / "adapter"))
model.save_pretrained(str(folder / "adapter"))
write_merged_model(base, folder / "adapter", None, folder / "merged")
"""


def test_what_loads_a_folder_asks_the_hub_for_nothing(hub: Hub, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Even if they may: transformers and PEFT look up any path that they take for an id."""
    command = [sys.executable, "-c", LOAD, str(tiny_model_dir), str(tmp_path)]
    variables = environment(hub.endpoint, tmp_path / "home")
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file() and not hub.requests
