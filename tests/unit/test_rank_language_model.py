"""`rec-dist rank` with a language model in this process: its scores are those of whole sequences, its work has a limit, and a search
finds the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import rec_dist
from rec_dist.cli import main
from rec_dist.commands.ranked_model import ranked_model
from rec_dist.errors import UserError
from rec_dist.methods.ensemble.ranker import EnsembleScorer
from rec_dist.methods.ensemble.saved_model import EnsembleWeights
from rec_dist.models import attention, token_tree
from rec_dist.ranking.search import SearchScorer

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


def test_a_configuration_whose_run_has_ended_says_that_the_base_model_ranks(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rec_dist.prepare(config)
    with caplog.at_level("INFO", "rec_dist"):
        rec_dist.rank(config, HISTORIES, candidates={user: ["i020"] for user in HISTORIES})
        assert "starts from" not in caplog.text
        run = tmp_path / "run"
        run.mkdir()
        (run / "finished.json").write_text('{"step": 1}', encoding="utf-8")
        rec_dist.rank(config, HISTORIES, candidates={user: ["i020"] for user in HISTORIES})
    assert f"this is the model that the configuration starts from; for what it has trained, give {run}" in caplog.text


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


def lists_of(table: Any) -> dict[str, list[tuple[str, float]]]:
    lists: dict[str, list[tuple[str, float]]] = {}
    for row in table.to_pylist():
        lists.setdefault(row["user_id"], []).append((row["item_id"], row["score"]))
    return lists


def same(found: dict[str, list[tuple[str, float]]], wanted: dict[str, list[tuple[str, float]]]) -> bool:
    """Whether lists are equal, scores to 1e-4. None of the scores of these tests are closer to each other."""
    return list(found) == list(wanted) and all(
        [item for item, _ in found[user]] == [item for item, _ in wanted[user]]
        and [score for _, score in found[user]] == pytest.approx([score for _, score in wanted[user]], abs=1e-4)
        for user in found
    )


@pytest.mark.parametrize(
    ("changes", "score"),
    [((), None), ((), "trie"), (("task.kind=msl", "task.msl.temperature=2"), None), (("task.kind=msl",), "raw")],
)
def test_an_exact_search_finds_what_scoring_everything_finds(
    changes: tuple[str, ...], score: Any, tiny_config: Make, tmp_path: Path
) -> None:
    """Both scores, with seen items, an allow list and a user without a known item. The certificate says so."""
    made = tiny_config(tmp_path / "run", *changes)
    histories, allow = {**HISTORIES, "c": ["nothing"]}, [f"i{item:03d}" for item in range(0, 80, 2)]
    for limits in ({}, {"allow": allow, "exclude_seen": False}):
        everything = rec_dist.rank(made, histories, top_k=5, score=score, **limits)
        table = rec_dist.rank(made, histories, top_k=5, score=score, search="exact", max_catalogue=1, **limits)
        assert same(lists_of(table), lists_of(everything))
        rows = {row["user_id"]: row for row in table.to_pylist()}
        assert all(row["certified"] for row in rows.values())
        assert rows["a"]["rows_scored"] > 0 and rows["c"]["rows_scored"] == 0
        assert table.schema.names == [*everything.schema.names, "certified", "rows_scored"]


def test_both_scores_have_their_names(tiny_config: Make, tmp_path: Path) -> None:
    """`trie` shares out all probability among the titles; `raw` is what an SFT run is evaluated by, `trie` what MSL is."""
    sft, msl = tiny_config(tmp_path / "sft"), tiny_config(tmp_path / "msl", "task.kind=msl")
    raw, trie = (lists_of(rec_dist.rank(sft, HISTORIES, top_k=80, exclude_seen=False, score=name)) for name in ("raw", "trie"))
    assert sum(np.exp(score) for _, score in trie["a"]) == pytest.approx(1.0, abs=1e-4)
    assert sum(np.exp(score) for _, score in raw["a"]) < 0.01
    usual = {"top_k": 80, "exclude_seen": False}
    assert same(lists_of(rec_dist.rank(sft, HISTORIES, **usual)), raw)
    assert same(lists_of(rec_dist.rank(msl, HISTORIES, **usual)), trie)


def test_a_search_stops_at_its_budget(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list comes back, marked; the summary counts such users."""
    out, histories = tmp_path / "recs.jsonl", tmp_path / "h.jsonl"
    histories.write_text(json.dumps({"user_id": "a", "history": ["i003"]}) + "\n", encoding="utf-8")
    words = ["--histories", str(histories), "--search", "exact", "--beam", "3", "--max-rows", "30", "--top-k", "3"]
    assert main(["rank", str(config), *words, "--out", str(out)]) == 0
    assert "1 users have a list that may lack a better item" in capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows and not any(row["certified"] for row in rows) and 0 < rows[0]["rows_scored"] <= 30
    capsys.readouterr()
    assert main(["rank", str(config), "--search", "exact", "--max-rows", "1", "--histories", str(histories)]) == 0
    assert "1 users have no item left to recommend, or --max-rows ended" in capsys.readouterr().err
    beam = rec_dist.rank(config, {"a": ["i003"]}, search="beam", beam=3, top_k=3).to_pylist()
    exact = rec_dist.rank(config, {"a": ["i003"]}, search="exact", beam=3, top_k=3).to_pylist()
    assert 0 < beam[0]["rows_scored"] < exact[0]["rows_scored"]
    assert beam[0]["score"] <= exact[0]["score"] + 1e-4


def test_new_items_are_ranked_by_their_titles(config: Path, tiny_config: Make, tmp_path: Path) -> None:
    """Beside those of the data set, whose scores stay; in histories too."""
    new = {"n1": "Silent  Empire of Gold", "n2": "Winter"}
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\nn1,Silent&#32; Empire of Gold\nn2,Winter\n", encoding="utf-8")
    plain = lists_of(rec_dist.rank(config, HISTORIES, top_k=82))["a"]
    for items, search in ((new, "all"), (path, "exact")):
        found = lists_of(rec_dist.rank(config, HISTORIES, top_k=82, items=items, search=search))["a"]
        scores = dict(found)
        assert {item: scores[item] for item, _ in plain} == pytest.approx(dict(plain), abs=2e-4)
        data = rec_dist.prepare(config)
        titles = {**dict(zip(data.raw_items, data.titles, strict=True)), "n1": "Silent Empire of Gold", "n2": "Winter"}
        wanted = by_hand(tiny_config(tmp_path / "run"), titles, HISTORIES["a"], ["n1", "n2"])
        assert {item: scores[item] for item in new} == pytest.approx(wanted, abs=2e-4)
    again = {"n3": titles["i003"]}  # a title that an item has already goes on meaning that item
    found = rec_dist.rank(config, {"u": [titles["i003"]]}, items=again, candidates={"u": ["i003", "n3"]})
    assert found["item_id"].to_pylist() == ["n3"]
    after = lists_of(rec_dist.rank(config, {"u": ["i003", "n2"]}, items=new, top_k=3, candidates={"u": ["n1", "i004", "n2"]}))
    assert {item for item, _ in after["u"]} == {"n1", "i004"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("item_id,title\ni003,Other\n", ["items.csv:2", "'i003'", "already"]),
        ("item_id,title\nn1,A\nn1,B\n", ["items.csv:3", "'n1'", "twice"]),
        ("item_id,title\nn1,&nbsp;\n", ["items.csv:2", "empty title"]),
        ("item,title\nn1,A\n", ["items.csv:1", "item_id", "missing"]),
        ('{"item_id": "n1", "title": "\\ud800x"}\n', ["items.jsonl:1", "title", "half a character"]),
        ('{"item_id": "n1", "title": "\\u200b"}\n', ["items.jsonl:1", "empty title"]),
    ],
)
def test_bad_new_items_are_one_line(
    text: str, named: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("items.jsonl" if text.startswith("{") else "items.csv")
    path.write_text(text, encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    assert main(["rank", str(config), "--items", str(path), "--out", str(tmp_path / "recs.jsonl")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in named)
    path.write_text('{"item_id": "n1", "title": "A"}\n' if path.suffix == ".jsonl" else "item_id,title\nn1,A\n", encoding="utf-8")
    assert (
        main(["rank", str(config), "evaluate.ranker=popularity", "--items", str(path), "--out", str(tmp_path / "r.jsonl")]) == 2
    )
    assert "--items" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_the_exact_rank_of_an_item(config: Path) -> None:
    """That of the whole order, from one scorer; beyond the limit there is none."""
    loaded = ranked_model(config, ())
    data = loaded.data
    order = [row["item_id"] for row in rec_dist.rank(config, [["i003"]], top_k=80, exclude_seen=False).to_pylist()]
    history = np.asarray([data.raw_items.index("i003")], dtype=np.int32)
    with loaded.scorer() as scorer:
        assert isinstance(scorer, SearchScorer)
        for place in (0, 6, 30, 79):
            found = scorer.search(history).rank_of(data.raw_items.index(order[place]), limit=40)
            assert (found.rank, found.certified) == (place + 1 if place < 40 else None, True)


class Fixed:
    """The same score for an item after any history."""

    def __init__(self, scores: Any) -> None:
        self._scores = scores

    def score(self, histories: Any, candidates: Any) -> list[Any]:
        return [self._scores[items] for items in candidates]


@pytest.mark.parametrize("strength", [0.0, 10.0])
def test_an_ensemble_with_a_language_model_is_searched(strength: float, config: Path) -> None:
    """What the other members and terms add is a prior. A strong one leaves little to search."""
    loaded, rng = ranked_model(config, ()), np.random.default_rng(0)
    features, weights = ["lm", "fixed", "popularity"], np.asarray([0.7, strength, 0.1])
    learnt = EnsembleWeights(["lm", "fixed"], ["popularity"], features, features, weights, np.zeros((3, 3)), np.ones(3))
    rows = []
    with loaded.scorer() as scorer:
        ensemble = EnsembleScorer(learnt, {"lm": scorer, "fixed": Fixed(rng.normal(0, 5, 80))}, loaded.data, {})
        histories = [np.asarray([3, 10], dtype=np.int32), np.asarray([17], dtype=np.int32)]
        every = np.arange(80, dtype=np.int32)
        for history, scores in zip(histories, ensemble.score(histories, [every] * 2), strict=True):
            found = ensemble.search(history).top_k(6, beam=6)
            assert found.items.tolist() == np.argsort(-scores)[:6].tolist() and found.certified
            assert found.scores == pytest.approx(np.sort(scores)[::-1][:6], abs=1e-4)
            rows.append(found.rows)
    assert max(rows) < 150 if strength else min(rows) > 0
    for members, weight in (({"fixed": Fixed(rng.normal(0, 1, 80))}, 0.7), ({"lm": scorer}, 0.0)):
        weightless = replace(learnt, weights=np.asarray([weight, 1.0, 0.1]))
        with pytest.raises(UserError, match="exactly one member that can be searched"):
            EnsembleScorer(weightless, members, loaded.data, {}).search(histories[0])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--search", "exact", "--candidates", "c.jsonl"], ["--search exact", "--candidates"]),
        (["--beam", "5"], ["--beam (5)", "--search exact"]),
        (["--max-rows", "0", "--search", "exact"], ["--max-rows (0)"]),
        (["--max-catalogue", "-1"], ["--max-catalogue (-1)", "from 1 on"]),
        (["--search", "exact", "prompt.candidates=listed"], ["prompt.candidates=listed"]),
        (["--search", "exact", "evaluate.ranker=popularity"], ["--search", "leave"]),
        (["--score", "trie", "evaluate.ranker=popularity"], ["--score", "leave"]),
        (["--search", "exact", "evaluate.title_prior=0.5"], ["--search", "corrected", "evaluate.title_prior=0"]),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    words: list[str], named: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["rank", str(config), "--out", str(tmp_path / "recs.parquet"), *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in named)
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_whose_kept_keys_differ_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a layer of the cache gave the rows of a pass alone."""
    monkeypatch.setattr(token_tree._TreeLayer, "update", lambda self, keys, values, *args, **kwargs: (keys, values))
    monkeypatch.setattr(
        token_tree, "dense_mask", lambda seen, config, dtype: attention.dense_mask(seen[:, -len(seen) :], config, dtype)
    )
    with pytest.raises(UserError, match="keys and values are kept"):
        rec_dist.rank(config, HISTORIES, search="exact")
