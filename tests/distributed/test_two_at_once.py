"""Two processes of each command at one target: one result, whole, and the other process's too or one line that says why not.

In containers every command is process 1, so no name that either writes under may hold the process id. About two minutes.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from worker_processes import Child, run_command, start_command

from rec_dist.commands.verify import verify
from rec_dist.data.artifacts.embeddings import check_files, read_manifest
from rec_dist.storage.files import sha256

pytestmark = pytest.mark.slow


def both(folder: Path, *words: object) -> list[Child]:
    """The ends of two processes of one command that begin together. At least one has done its work."""
    children = [start_command(folder / f"out-{number}", *words) for number in (1, 2)]
    codes = [child.wait() for child in children]
    said = "\n".join(child.err for child in children)
    assert 0 in codes and set(codes) <= {0, 2}, said
    assert "Traceback" not in said
    for code, child in zip(codes, children, strict=True):
        errors = [line for line in child.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == 2), child.err
        assert not errors or "by another process" in errors[0] or "exists" in errors[0], errors
    return children


def nothing_is_left_beside(target: Path) -> None:
    assert [path.name for path in target.parent.glob(f".{target.name}.*")] == []


def written(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_prepare(trainer: Any, tmp_path: Path, place: str) -> None:
    value = trainer.config(tmp_path / "run", {"data.path": str(tmp_path / "data"), "data.prepare_on": place})
    config = written(tmp_path / "config.yaml", value)
    both(tmp_path, "prepare", config)
    verify(str(tmp_path / "data"))
    code, child = run_command(tmp_path / "again", "prepare", config)
    assert code == 0 and "kept" in child.err, child.err
    nothing_is_left_beside(tmp_path / "data")


def test_export(trainer: Any, tmp_path: Path) -> None:
    run = trainer.once()
    both(tmp_path, "export", run.path, "--out", tmp_path / "served")
    verify(str(tmp_path / "served"))
    nothing_is_left_beside(tmp_path / "served")


def test_embed(trainer: Any, tmp_path: Path) -> None:
    run = trainer.once()
    both(tmp_path, "embed", run.path, tmp_path / "items")
    manifest = read_manifest(tmp_path / "items")
    assert manifest is not None
    check_files(tmp_path / "items", manifest)


def test_rank(trainer: Any, tmp_path: Path) -> None:
    run, output = trainer.once(), tmp_path / "lists.parquet"
    both(tmp_path, "rank", run.path, "--top-k", 5, "--out", output)
    code, child = run_command(tmp_path / "alone", "rank", run.path, "--top-k", 5, "--out", tmp_path / "alone.parquet")
    assert code == 0, child.err
    assert sha256(output) == sha256(tmp_path / "alone.parquet")
    nothing_is_left_beside(output)


def test_evaluate(trainer: Any, tmp_path: Path) -> None:
    run, results = trainer.once(), tmp_path / "results"
    both(tmp_path, "evaluate", run.path, f"evaluate.output_dir={results}")
    rows = trainer.read(results).rows
    assert [row["event"] for row in rows] == ["evaluation"], "measured once"
    code, child = run_command(tmp_path / "again", "evaluate", run.path, f"evaluate.output_dir={results}")
    assert code == 0 and "evaluated already; nothing to do" in child.err, child.err


def test_train(trainer: Any, tmp_path: Path) -> None:
    config = written(tmp_path / "config.yaml", trainer.config(tmp_path / "run"))
    both(tmp_path, "train", config)
    verify(str(tmp_path / "run"))
    run, expected = trainer.read(tmp_path / "run"), trainer.once()
    assert run.steps == expected.steps, "no step twice"


def test_a_pipeline_and_its_report(trainer: Any, tmp_path: Path) -> None:
    config = written(tmp_path / "config.yaml", trainer.config(tmp_path / "run"))
    stages = [{"name": "popularity", "do": "evaluate", "target": str(config), "set": ["evaluate.ranker=popularity"]}]
    pipeline = {"title": "Tiny", "run_dir": str(tmp_path / "report"), "stages": stages}
    file = written(tmp_path / "pipeline.yaml", {"pipeline": pipeline})
    both(tmp_path, "run", file)
    assert "</html>" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "popularity" in (tmp_path / "report" / "table.txt").read_text(encoding="utf-8")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine", encoding="utf-8")
    written(file, {"pipeline": {**pipeline, "run_dir": str(tmp_path / "thesis")}})
    code, child = run_command(tmp_path / "foreign", "run", file)
    assert code == 2 and f"pipeline.run_dir ({tmp_path / 'thesis'}) holds thesis.txt" in child.err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]
