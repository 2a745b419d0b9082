"""`rec-dist rank` with a language model in this process: its scores are those of whole sequences, and its work has a limit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import rec_dist
from rec_dist.cli import main
from rec_dist.errors import UserError

Make = Callable[..., dict[str, Any]]
HISTORIES = {"a": ["i003", "i010", "i017"], "b": ["i050"]}


@pytest.fixture
def config(tiny_config: Make, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path / "run")), encoding="utf-8")
    return path


def by_hand(made: dict[str, Any], titles: dict[str, str], history: list[str], items: list[str]) -> dict[str, float]:
    """log p(title, end | history) of each item, with rec_dist.score on text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = made["model"]["path"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    shown = "".join(f"\n- {titles[item]}" for item in history)
    prompt = f"{made['prompt']['instruction']}{shown}\n-"
    logps = rec_dist.score(model, tokenizer, [prompt], [[f" {titles[item]}\n" for item in items]])[0]
    return dict(zip(items, logps.tolist(), strict=True))


def test_the_catalogue_by_brute_force(config: Path, tiny_config: Make, tmp_path: Path) -> None:
    """All 80 titles after each history, in micro-batches that hold a part of them."""
    table = rec_dist.rank(config, HISTORIES, top_k=80)
    data = rec_dist.prepare(config)
    titles = dict(zip(data.raw_items, data.titles, strict=True))
    rows = table.to_pylist()
    for user, history in HISTORIES.items():
        found = {row["item_id"]: row["score"] for row in rows if row["user_id"] == user}
        others = [item for item in data.raw_items if item not in history]
        wanted = by_hand(tiny_config(tmp_path / "run"), titles, history, others)
        assert found == pytest.approx(wanted, abs=2e-4)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_candidates_and_users_without_a_known_item(config: Path, tmp_path: Path, tiny_config: Make) -> None:
    histories = {**HISTORIES, "c": [], "d": ["nothing"]}
    candidates = {user: ["i020", "i003", "i070"] for user in histories}
    rows = rec_dist.rank(config, histories, candidates=candidates, top_k=2).to_pylist()
    assert [(row["user_id"], row["rank"]) for row in rows] == [(user, rank) for user in "abcd" for rank in (1, 2)]
    assert [row["fallback"] for row in rows] == [False] * 4 + [True] * 4
    data = rec_dist.prepare(config)
    wanted = by_hand(
        tiny_config(tmp_path / "run"), dict(zip(data.raw_items, data.titles, strict=True)), HISTORIES["a"], ["i020", "i070"]
    )
    assert {row["item_id"]: row["score"] for row in rows[:2]} == pytest.approx(wanted, abs=2e-4)


def test_corrected_scores_by_hand(config: Path, tiny_config: Make, tmp_path: Path) -> None:
    """(log p(title | history) - 0.5 log p(title | no history)) / tokens ** 2"""
    from transformers import AutoTokenizer

    made, items = tiny_config(tmp_path / "run"), ["i020", "i041", "i070"]
    data = rec_dist.prepare(config)
    titles = dict(zip(data.raw_items, data.titles, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(made["model"]["path"])
    after, alone = (by_hand(made, titles, history, items) for history in (HISTORIES["a"], []))
    lengths = {item: len(tokenizer(f" {titles[item]}", add_special_tokens=False).input_ids) + 1 for item in items}
    wanted = {item: (after[item] - 0.5 * alone[item]) / lengths[item] ** 2 for item in items}
    keys = ["evaluate.title_prior=0.5", "evaluate.length_power=2"]
    rows = rec_dist.rank(config, {"a": HISTORIES["a"]}, keys, candidates={"a": items}).to_pylist()
    assert {row["item_id"]: row["score"] for row in rows} == pytest.approx(wanted, abs=2e-4)
    with pytest.raises(UserError, match="chosen by `rec-dist evaluate`"):
        rec_dist.rank(config, HISTORIES, ["evaluate.length_power=valid"])


def test_a_catalogue_above_the_limit_needs_candidates(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "recs.jsonl"
    before = sorted(tmp_path.iterdir())
    assert main(["rank", str(config), "--max-catalogue", "79", "--out", str(out)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(word in line for word in ("80 titles", "--max-catalogue (79)", "--candidates", "--allow"))
    assert sorted(tmp_path.iterdir()) == before
    allow, histories = tmp_path / "allow.txt", tmp_path / "h.jsonl"
    allow.write_text("i001\ni002\n", encoding="utf-8")
    histories.write_text(json.dumps({"user_id": "a", "history": ["i003"]}) + "\n", encoding="utf-8")
    words = ["--max-catalogue", "79", "--out", str(out), "--allow", str(allow), "--histories", str(histories)]
    assert main(["rank", str(config), *words]) == 0
    assert [json.loads(line)["rank"] for line in out.read_text(encoding="utf-8").splitlines()] == [1, 2]


def test_a_prompt_that_lists_candidates_takes_as_many(tiny_config: Make, tmp_path: Path) -> None:
    """Seen items stay in the list that the prompt shows, and are left out of the answer."""
    made = tiny_config(tmp_path / "run", "prompt.candidates=listed", "prompt.num_candidates=3", "evaluate.num_candidates=3")
    candidates = {"a": ["i020", "i003", "i070"], "b": ["i020", "i003", "i070"]}
    rows = rec_dist.rank(made, HISTORIES, candidates=candidates).to_pylist()
    assert [(row["user_id"], row["rank"]) for row in rows] == [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    with pytest.raises(UserError, match=r"prompt\.num_candidates is 3 and a user has 2"):
        rec_dist.rank(made, HISTORIES, candidates={"a": ["i020", "i003"]})
