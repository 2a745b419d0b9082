"""`rec-dist audit`: every check finds the fault that is planted for it, and is silent where there is none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audited_data import LENGTH, NUM_ITEMS, Bag, Oracle, prepared, title, walk, walks, write_questions
from prepared_rows import Row, write_prepared

import rec_dist
from rec_dist.auditing.audit import CHECKS, Audit
from rec_dist.auditing.chance import binomial_tail
from rec_dist.auditing.check import CLEAN, FEWEST_USERS, FINDING, NOT_APPLICABLE, Outcome
from rec_dist.auditing.checks.cold import _groups
from rec_dist.auditing.questions import AuditedModel, Subject, questions_of_examples
from rec_dist.cli import main
from rec_dist.config.schema import DataConfig, RunConfig
from rec_dist.config.yaml_text import to_yaml
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prepare.prepare import prepare
from rec_dist.evaluation.baselines import CandidateScorer, PopularityScorer
from rec_dist.evaluation.examples import build_eval_examples

BY_NAME = {check.name: check for check in CHECKS}
OF_DATA = ["candidates", "position", "later", "duplicates", "copied", "baselines", "cold"]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("clean"), walks())


def subject(path: Path, scorer: CandidateScorer | None = None, **changes: Any) -> Subject:
    """The test split of a data set, asked of a scorer."""
    data = PreparedData.open(path)
    examples = build_eval_examples(data, split="test", num_candidates=20, max_users=None, seed=0)
    examples = [example for example in examples if len(example.history) > 1]
    model = None if scorer is None else AuditedModel(scorer, slow=False, window=10, base=None)
    questions = questions_of_examples(examples, source="the test split", ranks_all=False)
    return replace(Subject(questions, data, examples, "test", model), **changes)


def outcome(name: str, path: Path, scorer: CandidateScorer | None = None) -> Outcome:
    return BY_NAME[name].outcome(subject(path, scorer))


def questions(
    num: int = 240, *, seeded: bool = False, first: bool = False, easy: bool = False
) -> list[tuple[list[int], int, list[int]]]:
    """Questions with 20 candidates: drawn by the target if seeded, with the target in front, or with easy company."""
    rng, rows = np.random.default_rng(3), []
    for _ in range(num):
        *history, target = walk(rng)[:6]
        if easy:  # the target is one of the popular items, its company never
            target = int(rng.integers(12))
        drawn = np.random.default_rng(target) if seeded else rng
        pool = np.arange(30, NUM_ITEMS) if easy else np.arange(NUM_ITEMS)
        others = drawn.permutation(np.setdiff1d(pool, [target]))[:19].tolist()
        among = [target, *others] if first else rng.permutation([target, *others]).tolist()
        rows.append(([item for item in history if item != target], target, among))
    return rows


def audited(path: Path, *words: str) -> Audit:
    return rec_dist.audit(path, list(words))


def test_a_clean_data_set_and_clean_questions_pass_every_check(clean: Path, tmp_path: Path) -> None:
    of_split = audited(clean)
    assert of_split.clean, str(of_split)
    assert [name for name, one in of_split.outcomes.items() if one.verdict == CLEAN] == OF_DATA
    assert {one.verdict for name, one in of_split.outcomes.items() if name not in OF_DATA} == {NOT_APPLICABLE}
    asked = audited(clean, f"evaluate.questions={write_questions(tmp_path / 'q.jsonl', questions())}")
    assert asked.clean, str(asked)
    assert asked.outcomes["later"].verdict == NOT_APPLICABLE and asked.outcomes["candidates"].verdict == CLEAN


@pytest.mark.parametrize(
    ("fault", "check"), [({"seeded": True}, "candidates"), ({"first": True}, "position"), ({"easy": True}, "baselines")]
)
def test_candidates_with_one_fault_fail_the_one_check(clean: Path, tmp_path: Path, fault: dict[str, bool], check: str) -> None:
    path = clean
    if "easy" in fault:  # the twelve items that open the questions are what everybody takes
        rng = np.random.default_rng(8)
        taken = [[*rng.permutation(12)[:8].tolist(), *rng.permutation(np.arange(12, NUM_ITEMS))[:4].tolist()] for _ in range(400)]
        path = prepared(tmp_path / "popular", taken)
    found = audited(path, f"evaluate.questions={write_questions(tmp_path / 'q.jsonl', questions(**fault))}")
    assert list(found.findings) == [check], str(found)


def test_the_leak_of_the_released_lists_of_sdpo(tmp_path: Path) -> None:
    """Their layout: candidates drawn with the target as the seed. A lookup without model and history answers nearly all."""
    rng, rows = np.random.default_rng(0), {True: [], False: []}
    for number in range(300):
        target = int(rng.integers(40))
        for seeded, kept in rows.items():
            drawn = np.random.default_rng(target if seeded else 1000 + number)
            listed = drawn.permutation([target, *drawn.permutation(np.setdiff1d(np.arange(400), [target]))[:19].tolist()])
            history = [f"artist {item}" for item in rng.integers(400, size=10).tolist()]
            fields = {
                "historyList": history,
                "itemList": [f"artist {item}" for item in listed],
                "trueSelection": f"artist {target}",
            }
            kept.append(json.dumps(fields))
    verdicts = {}
    for seeded, lines in rows.items():
        (tmp_path / f"{seeded}.jsonl").write_text("\n".join(lines))
        path = tmp_path / f"data-{seeded}"
        prepare(DataConfig(source=str(tmp_path / f"{seeded}.jsonl"), path=str(path), format="preferences"))
        verdicts[seeded] = audited(path).outcomes["candidates"]
    assert (verdicts[True].verdict, verdicts[False].verdict) == (FINDING, CLEAN)
    answered = float(verdicts[True].measured[0].partition(" answers ")[2].partition(" %")[0])
    assert answered > 90


def test_a_run_on_preference_rows_points_to_its_rows(tmp_path: Path) -> None:
    row = {"historyList": ["a", "b"], "itemList": ["c", "d"], "trueSelection": "d"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(source=str(tmp_path / "rows.jsonl"), path=str(tmp_path / "data"), format="preferences")
    prepare(data)
    run = tmp_path / "run"
    run.mkdir()
    config = RunConfig.model_validate({"data": data.model_dump(), "train": {"run_dir": str(run)}})
    (run / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(rec_dist.UserError, match=f"is a run on preference rows.*`rec-dist audit {tmp_path / 'data'}`"):
        rec_dist.audit(str(run))


def test_a_split_that_trains_on_the_future(tmp_path: Path) -> None:
    found = audited(prepared(tmp_path, walks(), split="leave_one_out"))
    assert list(found.findings) == ["later"], str(found)
    assert "leave_one_out" in found.findings["later"][0]


def test_second_accounts(tmp_path: Path) -> None:
    rows = walks(120)
    path = prepared(tmp_path, rows + rows, split="user_ratio", valid_fraction=0.0, test_fraction=0.3)
    assert "duplicates" in audited(path).findings
    rng = np.random.default_rng(9)
    others = rows + [walk(rng) for _ in rows]
    path = prepared(tmp_path / "other", others, split="user_ratio", valid_fraction=0.0, test_fraction=0.3)
    assert "duplicates" not in audited(path).findings


def test_a_training_row_that_reaches_into_its_target(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = [walk(rng) for _ in range(30)]
    titles = [title(item) for item in range(NUM_ITEMS)]
    for name, stop in (("right", LENGTH - 1), ("wrong", LENGTH)):
        train = [Row(user, items[:stop] if user < 3 else items[: LENGTH - 1]) for user, items in enumerate(rows)]
        test = [Row(user, items, first_target=LENGTH - 1) for user, items in enumerate(rows)]
        data = write_prepared(tmp_path / name, {"train": train, "test": test}, titles)
        faults = BY_NAME["duplicates"].outcome(subject(data.location.folder)).faults
        assert any("3 users" in fault for fault in faults) == (name == "wrong")


def test_users_of_two_splits_that_must_be_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = [Row(user, walk(rng)) for user in range(30)]
    data = write_prepared(tmp_path / "data", {"train": rows, "test": rows[:4]}, [title(item) for item in range(NUM_ITEMS)])
    apart = replace(data, manifest=replace(data.manifest, settings={"split": "user_ratio"}))
    faults = BY_NAME["duplicates"].outcome(replace(subject(data.location.folder), data=apart)).faults
    assert any("4 users" in fault and "user_ratio" in fault for fault in faults)


def test_titles_that_the_history_holds(tmp_path: Path) -> None:
    """Every item has a twin with the same title, and the twin of the target was chosen before."""
    half = NUM_ITEMS // 2
    path = prepared(tmp_path, walks(), [title(item % half) for item in range(NUM_ITEMS)], merge_equal_titles=False)
    rows = [([*history, (target + half) % NUM_ITEMS], target, among) for history, target, among in questions()]
    found = audited(path, f"evaluate.questions={write_questions(tmp_path / 'q.jsonl', rows)}")
    assert "copied" in found.findings, str(found)


def test_a_model_that_is_not_shown_to_beat_a_baseline(clean: Path) -> None:
    data = PreparedData.open(clean)
    told = {example.history.tobytes(): example.target for example in subject(clean).examples}
    assert outcome("baselines", clean, Oracle(data, told=told)).verdict == CLEAN
    assert outcome("baselines", clean, Oracle(data)).verdict == FINDING  # neighbours know the successor as well
    faults = outcome("baselines", clean, PopularityScorer(data.train_counts)).faults
    assert any("beat popularity" in fault for fault in faults) and any("beat nearest neighbours" in fault for fault in faults)


def test_cold_targets_that_are_ranked_at_random(clean: Path) -> None:
    whole = subject(clean)
    assert whole.data is not None
    targets = np.bincount(whole.questions.targets, minlength=NUM_ITEMS)
    unknown = np.flatnonzero(targets).astype(np.int32)[::2]  # half of the targets had no training interaction
    counts = whole.data.train_counts.copy()
    counts[unknown] = 0
    cold = replace(whole.data, train_counts=counts)
    verdicts = []
    for blind in (None, unknown):
        model = AuditedModel(Oracle(whole.data, blind), slow=False, window=10, base=None)
        verdicts.append(BY_NAME["cold"].outcome(replace(whole, data=cold, model=model)))
    assert [one.verdict for one in verdicts] == [CLEAN, FINDING]
    assert "cold" in verdicts[1].faults[0]


def test_a_model_that_reads_no_order(clean: Path) -> None:
    data = PreparedData.open(clean)
    assert outcome("order", clean, Oracle(data)).verdict == CLEAN
    assert outcome("order", clean, Bag(data)).verdict == FINDING


def test_too_few_users_for_an_interval(clean: Path) -> None:
    """One question is a point without a width: it would show anything."""
    whole = subject(clean, Oracle(PreparedData.open(clean)))
    examples = list(whole.examples)[: FEWEST_USERS - 1]
    few = replace(whole, examples=examples, questions=questions_of_examples(examples, source="", ranks_all=False))
    for name in ("baselines", "order", "concentration"):
        assert BY_NAME[name].outcome(few).verdict == NOT_APPLICABLE and BY_NAME[name].outcome(whole).verdict != NOT_APPLICABLE
    told = BY_NAME["cold"].outcome(few)
    assert told.verdict == CLEAN and "auc" not in " ".join(told.measured)


def test_groups_of_targets_by_a_median_between_two_numbers() -> None:
    groups = _groups(np.asarray([0, 3, 4, 9, 9]))
    assert {name: inside.tolist().count(True) for name, inside in groups.items()} == {
        "cold (no training interaction)": 1,
        "rare (1 to 6)": 2,
        "frequent (more than 6)": 2,
    }


def test_a_catalogue_that_the_histories_hold(clean: Path) -> None:
    """Nothing is left to recommend, so there is no exposure to divide by."""
    whole = subject(clean, Oracle(PreparedData.open(clean)))
    everything = np.arange(NUM_ITEMS, dtype=np.int32)
    seen = replace(whole, examples=[replace(example, history=everything) for example in whole.examples])
    assert BY_NAME["concentration"].outcome(seen).skipped == "the histories hold the whole catalogue."


def test_a_model_that_recommends_the_same_to_everybody(clean: Path) -> None:
    data = PreparedData.open(clean)
    assert outcome("concentration", clean, Oracle(data)).verdict == CLEAN
    assert outcome("concentration", clean, PopularityScorer(data.train_counts)).verdict == FINDING


def test_a_language_model_that_knows_titles_by_heart(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    titles = [title(item) for item in range(NUM_ITEMS)]
    data = write_prepared(tmp_path / "data", {"train": [Row(0, [0, 1])], "test": [Row(0, [0, 1, 2], 2)]}, titles)
    model: Any = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    tokens = [tokenizer(text).input_ids for text in titles[:20]]
    longest = max(map(len, tokens))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens])
    labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in tokens])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(str(tmp_path / "trained"))
    tokenizer.save_pretrained(str(tmp_path / "trained"))
    verdicts = []
    for base in (tiny_model_dir, tmp_path / "trained"):
        model_of = AuditedModel(PopularityScorer(data.train_counts), slow=True, window=10, base=base)
        found = BY_NAME["memorised"].outcome(Subject(subject(data.location.folder).questions, data, (), "test", model_of))
        verdicts.append((found.verdict, found.measured))
    assert [verdict for verdict, _ in verdicts] == [CLEAN, FINDING], verdicts


def test_a_run_from_the_command_line(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neighbours learn the successor, so the run has one fault: it is no better than itself. Exit codes 1, 0 and 2, and a page."""
    value = {"data": {"path": str(clean)}, "task": {"kind": "neighbours"}, "train": {"run_dir": str(tmp_path / "run")}}
    run = rec_dist.train(value)
    page = tmp_path / "audit.html"
    assert main(["audit", str(run.path), "--html", str(page)]) == 1
    printed = capsys.readouterr().out
    assert "not shown to beat nearest neighbours" in printed and "1 check found a fault" in printed
    html = page.read_text(encoding="utf-8")
    assert "not shown to beat nearest neighbours" in html and "<script" not in html and "default-src 'none'" in html
    assert main(["audit", str(run.path), "--skip", "baselines"]) == 0
    assert main(["audit", str(run.path), "--html", str(page)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--skip", "luck"], ("--skip (luck)", "candidates, position")),
        (["evaluate.questions=nowhere.csv"], ("evaluate.questions", "name a file")),
        (["--html", "s3://bucket/x.html"], ("--html (s3://bucket/x.html) is a URI",)),
    ],
)
def test_what_cannot_be_audited(
    clean: Path, capsys: pytest.CaptureFixture[str], words: list[str], names: tuple[str, ...]
) -> None:
    assert main(["audit", str(clean), *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(name in error for name in names)


def test_a_target_that_is_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert "neither a prepared data set nor a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(("hits", "trials", "rate"), [(3, 10, 0.2), (10, 10, 0.5), (40, 1000, 0.02), (1, 5, 1e-6)])
def test_binomial_tails(hits: int, trials: int, rate: float) -> None:
    from scipy.stats import binom

    assert binomial_tail(hits, trials, rate) == pytest.approx(float(binom.sf(hits - 1, trials, rate)), rel=1e-9)
