"""Distillation from a language model and an ensemble in two stages, whose work is bounded; the short name; the final table."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rec_dist
from rec_dist.cli import main
from rec_dist.commands.distil import DistilOptions, make_lists
from rec_dist.commands.ranked_model import ranked_model
from rec_dist.data.artifacts.predictions import PREDICTIONS_NAME, Predictions
from rec_dist.data.artifacts.scored_lists import ScoredLists, read_lists
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.errors import UserError
from rec_dist.methods.language_model.scorer import LanguageModelScorer
from rec_dist.methods.sequential.soft_targets import SoftTargets
from rec_dist.ranking import rank as ranking

Make = Callable[..., dict[str, Any]]
NUM = 6  # titles that the ensemble's language model reads
FEW = ["train.max_steps=8", "optimizer.warmup_steps=2"]


@pytest.fixture(scope="module")
def runs(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, rec_dist.Run]:
    """A language model, neighbours, and an ensemble of both in two stages."""
    folder = tmp_path_factory.mktemp("teachers")
    made = {kind: rec_dist.train(tiny_config(folder / kind, f"task.kind={kind}")) for kind in ("sft", "neighbours")}
    members = {"task.ensemble.members": {"neighbours": str(made["neighbours"].path), "lm": str(made["sft"].path)}}
    keys = [f"task.ensemble.rerank={NUM}", "task.ensemble.max_users=10", "task.ensemble.num_candidates=20"]
    made["ensemble"] = rec_dist.train(tiny_config(folder / "ensemble", "task.kind=ensemble", *keys, members))
    return made


def ranked(run: rec_dist.Run, data: PreparedData, history: np.ndarray) -> dict[int, float]:
    """What `rec-dist rank` finds after a history, with the score of every item."""
    rows = rec_dist.rank(run, [[data.raw_items[item] for item in history]], top_k=100).to_pylist()
    return {data.raw_items.index(row["item_id"]): row["score"] for row in rows}


def check_lists(teacher: rec_dist.Run, data: PreparedData, lists: ScoredLists) -> None:
    """Some lists against every score, and their shares at temperature 2: what stands behind the end of a list has none."""
    split = data.split("train")
    soft = SoftTargets(lists, split, temperature=2.0)
    for place in range(0, len(lists.scores), 4):
        row, position = int(np.searchsorted(split.user_ids, lists.lists.user_ids[place])), int(lists.lists.positions[place])
        history = split.items_of(row)[:position]
        wanted, num = ranked(teacher, data, history), data.num_items - len(np.unique(history))
        items, scores = lists.lists.items[place], lists.scores[place]
        assert len(wanted) == num and (items[num:] == -1).all() and (np.diff(scores[:num]) <= 0).all()
        assert dict(zip(items[:num].tolist(), scores[:num].tolist(), strict=True)) == pytest.approx(wanted, abs=2e-4)
        start = int(split.offsets[row]) + position
        (shares,) = soft.of(start, start + 1)[1]
        odds = np.exp((scores[:num].astype(np.float64) - scores[0]) / 2)
        np.testing.assert_allclose(shares[:num], odds / odds.sum(), rtol=1e-5)
        assert (shares[num:] == 0).all()


def test_a_language_model_teaches(runs: dict[str, rec_dist.Run], tmp_path: Path) -> None:
    """Lists longer than the catalogue, by a search, are those of scoring everything, and the student learns them."""
    words = [*FEW, f"train.run_dir={tmp_path / 'student'}"]
    student = rec_dist.distil(runs["sft"], "sequential", words, top_k=90, max_targets=9)
    data = open_data(student.config.data)
    folder = Path(student.config.task.sequential.distil.lists)  # type: ignore[attr-defined]
    lists = read_lists(folder, data_fingerprint=data.manifest.fingerprint)
    assert lists.lists.items.shape == (9, 90)
    check_lists(runs["sft"], data, lists)
    losses = [row["loss/teacher"] for row in student.metrics("step")]
    assert len(losses) == 8 and sum(losses) > 0


def test_an_ensemble_in_two_stages_reads_a_bounded_number_of_titles_a_block(
    runs: dict[str, rec_dist.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two reports lies the work of a block. Its lists, longer than what it reads, are those of scoring everything."""
    models = {name: ranked_model(run.path, ()) for name, run in runs.items()}
    assert {name: model.titles_read(80) for name, model in models.items()} == {"sft": 80, "neighbours": 0, "ensemble": NUM}
    assert models["ensemble"].titles_read(3) == 3
    monkeypatch.setattr(ranking, "TITLES", 4 * NUM)
    read, real = [], LanguageModelScorer.score

    def counted(self: LanguageModelScorer, histories: Any, candidates: Any) -> Any:
        read.append([len(items) for items in candidates])
        return real(self, histories, candidates)

    monkeypatch.setattr(LanguageModelScorer, "score", counted)
    make_lists(models["ensemble"], tmp_path, DistilOptions(90, 10), exclude_seen=True, progress=False)
    assert [len(block) for block in read] == [4, 4, 2] and {size for block in read for size in block} == {NUM}
    data = models["ensemble"].data
    check_lists(runs["ensemble"], data, read_lists(tmp_path, data_fingerprint=data.manifest.fingerprint))
    read.clear()
    rec_dist.rank(runs["ensemble"], [["i003"]] * 6)
    assert [len(block) for block in read] == [4, 2]


def test_the_short_name_takes_data_and_questions_of_the_run(runs: dict[str, rec_dist.Run], tmp_path: Path) -> None:
    teacher = runs["neighbours"]
    student = rec_dist.distil(teacher.path, "sequential", FEW, top_k=5)
    assert student.path == Path(f"{teacher.path}-student")
    assert (student.config.data, student.config.evaluate) == (teacher.config.data, teacher.config.evaluate)
    own = rec_dist.load_config({"extends": "method/sasrec", "data": teacher.config.data.model_dump(), "train": {"run_dir": "x"}})
    assert student.config.optimizer.lr == own.optimizer.lr and student.config.train.epochs == own.train.epochs
    assert rec_dist.distil(teacher, "sequential", FEW, top_k=5).path == student.path, "it is finished"
    assert rec_dist.distil(teacher.path / "model" / "..", "sequential", FEW, top_k=5).path == student.path
    given = own.model_copy(update={"train": student.config.train.model_copy(update={"run_dir": str(tmp_path / "given")})})
    lists = {"task.sequential.distil.lists": student.config.task.sequential.distil.lists}  # type: ignore[attr-defined]
    assert rec_dist.distil(teacher, given, lists, top_k=5).path == tmp_path / "given", "the lists are those of the first"


def table_of(
    teacher: rec_dist.Run, student: Path, *words: str, capsys: pytest.CaptureFixture[str]
) -> tuple[str, list[Predictions]]:
    """What the command prints, and the predictions of the teacher and the student that it is about."""
    capsys.readouterr()
    words = ("--into", "sequential", "--max-targets", "20", f"train.run_dir={student}", *FEW, *words)
    assert main(["distil", str(teacher.path), *words]) == 0
    beside = Path(f"{student}-teacher")
    folders = [beside if beside.is_dir() else teacher.path, student]
    return capsys.readouterr().out, [Predictions.read(folder / PREDICTIONS_NAME) for folder in folders]


def test_it_ends_with_a_table_of_both(runs: dict[str, rec_dist.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = runs["sft"]
    printed, (first, second) = table_of(teacher, tmp_path / "one", capsys=capsys)
    assert first.user_ids.tolist() == second.user_ids.tolist() and len(first.user_ids) == 20
    assert all(np.array_equal(a, b) for a, b in zip(first.candidates, second.candidates, strict=True))
    (line,) = [line for line in printed.splitlines() if line.startswith("student (one) - teacher (sft)") and "hr@1" in line]
    assert f"{np.mean(second.ranks == 1) - np.mean(first.ranks == 1):+.3f} [" in line
    assert "20 users of the test split, 10 candidates each." in printed
    assert "a list of 10 of the whole catalogue, median of 50 users one by one: teacher " in printed
    assert "% of the teacher's items are the student's too" in printed

    kept = (teacher.path / PREDICTIONS_NAME).read_bytes()
    printed, (first, second) = table_of(teacher, tmp_path / "two", "evaluate.num_candidates=4", capsys=capsys)
    assert {len(items) for items in (*first.candidates, *second.candidates)} == {4}
    assert "4 candidates each." in printed and (teacher.path / PREDICTIONS_NAME).read_bytes() == kept, "its own answers stay"

    printed, _ = table_of(teacher, tmp_path / "one", "--no-compare", capsys=capsys)
    assert printed == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["evaluate.questions=nowhere.csv"], ["evaluate.questions", "nowhere.csv"]),
        (["evaluate.num_candidates=1000"], ["evaluate.num_candidates", "80"]),
        (["--top-k", "0"], ["--top-k (0)"]),
        (["task.kind=sft"], ["task.kind=sft", "--into sequential"]),
    ],
)
def test_what_would_stop_it_is_found_before_the_work(
    words: list[str], named: list[str], runs: dict[str, rec_dist.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = f"train.run_dir={tmp_path / 'student'}"
    assert main(["distil", str(runs["neighbours"].path), "--into", "sequential", run_dir, *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in named), line
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        rec_dist.distil(tmp_path, "sequential")


def test_a_teacher_that_cannot_rank_the_catalogue_leaves_nothing(runs: dict[str, rec_dist.Run], tmp_path: Path) -> None:
    """Its scores are corrected by values that only an evaluation chooses."""
    teacher = shutil.copytree(runs["sft"].path, tmp_path / "sft")
    text = (teacher / "config.yaml").read_text(encoding="utf-8")
    (teacher / "config.yaml").write_text(text.replace("title_prior: 0.0", "title_prior: valid"), encoding="utf-8")
    with pytest.raises(UserError, match=r"evaluate\.title_prior=valid"):
        rec_dist.distil(teacher, "sequential", FEW, max_targets=3)
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
