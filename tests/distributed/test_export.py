"""`rec-dist export`: what it writes scores as `evaluate` did, without rec-dist, in each format; and it arrives on a hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import TOKEN, environment
from scoring_server import serving_model
from upload_server import taking_uploads
from worker_processes import run_command

from rec_dist.data.artifacts.predictions import Predictions
from rec_dist.data.dataset.prepared_data import PreparedData

WITHOUT = """
import runpy, sys
sys.modules["rec_dist"] = None  # an import of it fails
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def run(trainer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run with an adapter."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(trainer.once("task.kind=sft").path, folder)
    code, child = run_command(folder.parent / "out", "evaluate", folder, "evaluate.max_users=5")
    assert code == 0, child.err
    return folder


def asked_and_scored(run: Path, data_dir: Path) -> tuple[list[str], list[str], list[float]]:
    """The history and candidates of the first evaluated question, as ids and titles, and the scores that evaluate gave."""
    predictions, data = Predictions.read(run / "predictions.arrow"), PreparedData.open(data_dir)
    split = data.split("test")
    row = int((split.user_ids == predictions.user_ids[0]).argmax())
    history = split.items_of(row)[: int(predictions.positions[0])]
    candidates = predictions.candidates[0].tolist()
    return [data.titles[item] for item in history], [data.raw_items[item] for item in candidates], predictions.scores[0].tolist()


def scores_of(script: Path, *words: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT, str(script), *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return {row["item"]: row["score"] for row in json.loads(done.stdout)}


@pytest.mark.parametrize("kind", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def test_an_exported_model_scores_as_evaluate_did(run: Path, tiny_data: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "served"
    code, child = run_command(tmp_path, "export", run, "--out", folder, "--format", kind, "--license", "apache-2.0")
    assert code == 0, child.err
    history, candidates, scores = asked_and_scored(run, tiny_data)
    asked = json.dumps({"history": history, "candidates": candidates})
    wanted = pytest.approx(dict(zip(candidates, scores, strict=True)), abs=1e-4)
    assert scores_of(folder / "score.py", asked) == wanted
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "prompt.json", "catalogue.jsonl", "score.py", "tokenizer.json"} <= names
    assert ("adapter_model.safetensors" in names, "model.safetensors" in names) == (kind == "hf", kind == "vllm")
    if kind == "vllm":
        with serving_model(folder) as url:
            for server in ("vllm", "sglang"):
                assert scores_of(folder / "score_on_server.py", server, url, asked) == wanted


@pytest.mark.slow
def test_the_card_says_what_was_measured_and_its_code_runs(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "card"
    code, child = run_command(tmp_path, "export", run, "--out", folder, "--license", "mit", "--data-license", "other")
    assert code == 0, child.err
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    measured = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["row"]["metrics"]
    told = {one["type"]: one["value"] for one in front["model-index"][0]["results"][0]["metrics"]}
    assert told == pytest.approx({name: metric["value"] for name, metric in measured.items()}, abs=1e-6)
    assert (front["license"], front["library_name"]) == ("mit", "peft")
    assert "95 % bootstrap interval over users" in card and "| data, titles included | other |" in card
    assert str(run) not in card and str(tiny_data) not in card
    code = card.split("```python\n")[1].split("```")[0].replace('"FOLDER"', repr(str(folder)))
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys\nsys.modules['rec_dist'] = None\n{code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 3


@pytest.mark.slow
def test_an_export_arrives_on_a_hub(run: Path, tmp_path: Path) -> None:
    """The hub is a small server on loopback. A repository is private unless asked otherwise; without a token nothing is written."""
    with taking_uploads() as hub:
        variables = environment(hub.endpoint, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
        command = [sys.executable, "-m", "rec_dist", "export", str(run), "--push", "me/ranker", "--out"]

        def export(name: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
            line = [*command, str(tmp_path / name)]
            return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=300, check=False)

        done = export("sent", variables)
        assert done.returncode == 0, done.stderr
        assert hub.repositories == {"me/ranker": True} and f"{hub.endpoint}/me/ranker/commit/" in done.stderr
        kept = {path.name: path.read_bytes() for path in (tmp_path / "sent").iterdir()}
        assert hub.files["me/ranker"] == kept and set(hub.cards) == {kept["README.md"].decode()}

        refused = export("refused", {**variables, "HF_TOKEN": "hf_of-somebody-else"})
        assert refused.returncode == 2 and "HTTP 401" in refused.stderr.splitlines()[-1]
        assert (tmp_path / "refused" / "README.md").is_file()
        without = export("without", {name: value for name, value in variables.items() if name != "HF_TOKEN"})
        assert without.returncode == 2 and "needs a token" in without.stderr
        assert not (tmp_path / "without").exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--push", "me"], ("--push (me) is no id of the Hub", "org/name")),
        (["--push", "me/x--y"], ("--push (me/x--y) is no id of the Hub", "without --")),
        (["--public"], ("--public", "add --push ORG/NAME")),
        (["--push", "me/x"], ("HF_HUB_OFFLINE is set",)),
        (["task.kind=sdpo"], ("task.kind=sdpo", "was trained with sft; leave it out")),
    ],
)
def test_what_cannot_be_exported(run: Path, tmp_path: Path, words: list[str], names: tuple[str, ...]) -> None:
    code, child = run_command(tmp_path / "out", "export", run, "--out", tmp_path / "served", *words)
    error = child.err.splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and all(name in error for name in names), child.err
    assert not (tmp_path / "served").exists()


@pytest.mark.slow
def test_formats_that_a_run_does_not_have(trainer: Any, tmp_path: Path) -> None:
    """A whole model stays whole, and is no adapter."""
    whole = trainer.once("task.kind=sft", "adapter.kind=none")
    code, child = run_command(tmp_path / "out", "export", whole.path, "--out", tmp_path / "served", "--format", "peft")
    assert code == 2 and "trained a whole model; use --format merged" in child.err
    code, child = run_command(tmp_path / "out", "export", whole.path, "--out", tmp_path / "served")
    assert code == 0, child.err
    from safetensors.torch import load_file

    saved, exported = load_file(whole.path / "model" / "model.safetensors"), load_file(tmp_path / "served" / "model.safetensors")
    assert all((exported[name] == saved[name]).all() for name in exported)
