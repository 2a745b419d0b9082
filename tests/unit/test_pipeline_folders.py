"""Where the evaluations of a pipeline lie: where evaluate writes them, and none in the place of another."""

from pathlib import Path

import pytest

from rec_dist.commands.run import _evaluated, _results_dir, run_pipeline
from rec_dist.config.load import load_config
from rec_dist.config.pipeline import Stage, load_pipeline
from rec_dist.config.yaml_text import to_yaml
from rec_dist.errors import UserError
from rec_dist.runtime.run_directory import RunDirectory

_POPULARITY = "{extends: sequential-ml-100k:sasrec, train: {run_dir: ~/runs/sasrec}}"


def pipeline(folder: Path, *stages: str) -> Path:
    """A file whose stages evaluate, with the run `sasrec` in it."""
    listed = "".join(f"\n    - {{do: evaluate, {stage}}}" for stage in stages)
    text = f"pipeline:\n  title: T\n  run_dir: {folder}/report\n  stages:{listed}\nruns:\n  sasrec: {_POPULARITY}\n"
    path = folder / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "second",
    [
        "name: b, target: runs/x, set: [evaluate.exclude_seen=false]",
        "name: b, row: a, target: runs/../runs/x",
        "name: b, target: runs/y, set: [evaluate.output_dir=runs/x]",
    ],
)
def test_two_evaluations_into_one_folder_are_one_line(tmp_path: Path, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = pipeline(tmp_path, "name: a, target: runs/x", second)
    with pytest.raises(UserError, match=r"a and b evaluate into one folder \(.*runs/x\).*evaluate\.output_dir"):
        run_pipeline(path, [])
    assert not (tmp_path / "report").exists()


def test_configurations_into_one_folder_are_one_line_and_others_are_not(tmp_path: Path) -> None:
    both = ("name: a, target: sasrec", "name: b, target: sasrec, set: [evaluate.seed=1]")
    with pytest.raises(UserError, match="a and b evaluate into one folder"):
        run_pipeline(pipeline(tmp_path, *both), [])
    path = pipeline(tmp_path, "name: a, target: sasrec", "name: b, target: sasrec, set: [evaluate.ranker=popularity]")
    folders = _evaluated(load_pipeline(path), path)
    assert folders == {"a": Path("~/runs/sasrec-base").expanduser(), "b": Path("~/runs/sasrec-popularity").expanduser()}


def test_the_folder_that_the_run_itself_names_is_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    config = load_config(Path("sequential-ml-100k:sasrec"), [f"evaluate.output_dir={tmp_path}/elsewhere"])
    run.config_path.write_text(to_yaml(config), encoding="utf-8")
    path = pipeline(tmp_path, f"name: a, target: {run.path}")
    assert _evaluated(load_pipeline(path), path) == {"a": tmp_path / "elsewhere"}


def test_a_home_folder_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ in pipeline.run_dir, and in the folder of embeddings, which `rec-dist embed` expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = pipeline(tmp_path, "name: a, target: sasrec")
    path.write_text(path.read_text(encoding="utf-8").replace(f"{tmp_path}/report", "~/report"), encoding="utf-8")
    report = tmp_path / "report"
    report.mkdir()
    (report / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=rf"pipeline\.run_dir \({report}\) holds notes\.txt"):
        run_pipeline(path, [])
    assert not (tmp_path / "~").exists()
    assert _results_dir(Stage("e", "e", "embed", "runs/x", False, "~/vectors", ())) == tmp_path / "vectors"


@pytest.mark.parametrize("text", ["[{", '[{"name": "a"}]', "[1]"])
def test_a_damaged_record_of_stages_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "report").mkdir()
    record = tmp_path / "report/stages.json"
    record.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"stages\.json .*remove that file"):
        run_pipeline(pipeline(tmp_path, "name: a, target: sasrec"), [])
    assert record.read_text(encoding="utf-8") == text
