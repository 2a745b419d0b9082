"""`rec-dist serve` over real HTTP: what is served is what `rec-dist rank` gives, and what a wrong request gets."""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import CYCLE, finished_run, items_of, raw_item, title
from http_clients import Client, assert_same_list, ranked_pairs, serving
from pydantic import ValidationError

import rec_dist
from benchmarks import serve as benchmark
from rec_dist.config.load import load_saved
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.evaluation.baselines import Floats
from rec_dist.runtime.arrays import I32
from rec_dist.serving.engine import Answer, Engine, Failure, Query
from rec_dist.serving.guard import MOST_BYTES
from rec_dist.serving.messages import RankQuestion

TOKEN = "a-token-of-23-letters-x"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[Client]:
    with serving(run) as client:
        yield client


def ranked(run: Path, history: list[str], **options: Any) -> list[tuple[str, float]]:
    """What rec_dist.rank gives."""
    rows = rec_dist.rank(run, {"u": history}, **options).to_pylist()
    return [(row["item_id"], row["score"]) for row in rows]


def test_served_lists_and_scores_are_the_ranked_ones_under_mixed_load(run: Path, client: Client) -> None:
    """Histories of all lengths, lists and whole catalogues at once, so that they meet in batches of every kind."""
    histories = [
        [raw_item((start + step) % CYCLE) for step in range(length)] for start in range(0, CYCLE, 3) for length in (1, 3, 7)
    ]
    short = [raw_item(number) for number in (7, 2, 9, 4)]
    wanted = {
        tuple(history): (
            ranked(run, history, top_k=5),
            ranked(run, history, top_k=3, exclude_seen=False, candidates={"u": short}),
            dict(ranked(run, history, top_k=CYCLE, exclude_seen=False)),
        )
        for history in histories
    }

    def ask(history: list[str]) -> None:
        whole, listed, scores = wanted[tuple(history)]
        assert_same_list(ranked_pairs(client.post("/v1/rank", {"history": history, "top_k": 5})), whole)
        body = {"history": history, "top_k": 3, "exclude_seen": False, "candidates": [*short, short[0], "nothing"]}
        reply = client.post("/v1/rank", body)
        assert_same_list(ranked_pairs(reply), listed)
        assert reply.body["unknown_candidates"] == 1
        names = [short[2], title(0), "nothing", short[2]]
        reply = client.post("/v1/score", {"history": history, "candidates": names})
        assert reply.body["scores"] == [
            pytest.approx(scores[short[2]], abs=1e-4),
            pytest.approx(scores[raw_item(0)], abs=1e-4),
            None,
            pytest.approx(scores[short[2]], abs=1e-4),
        ]

    before = batches(client)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, histories * 8))
    after = batches(client)
    requests, batched = after[0] - before[0], after[1] - before[1]
    assert requests == 3 * 8 * len(histories)
    assert batched < requests, "requests that wait together are scored together"


def batches(client: Client) -> tuple[int, int]:
    """(requests scored, batches) so far."""
    text = client.get("/metrics").body
    values = [re.search(rf"^rec_dist_serve_batch_requests_{name} (\S+)$", text, re.MULTILINE) for name in ("sum", "count")]
    assert all(values), text
    return tuple(int(float(found[1])) for found in values if found)  # type: ignore[return-value]


def test_a_user_of_the_run_and_titles_as_names(run: Path, client: Client) -> None:
    history = [raw_item(item) for item in items_of(5)]
    wanted = ranked(run, history, top_k=CYCLE)
    assert_same_list(ranked_pairs(client.post("/v1/rank", {"user_id": "005", "top_k": CYCLE})), wanted)
    by_title = [title(item) for item in items_of(5)]
    assert_same_list(ranked_pairs(client.post("/v1/rank", {"history": by_title, "top_k": CYCLE})), wanted)
    reply = client.post("/v1/rank", {"history": [*history, "unknown"], "top_k": 1})
    assert (reply.body["unknown_history"], reply.body["fallback"]) == (1, False)


def test_without_a_known_item_the_order_is_that_of_popularity(run: Path, client: Client) -> None:
    wanted = ranked(run, [], top_k=CYCLE)
    for history in ([], ["unknown"]):
        reply = client.post("/v1/rank", {"history": history, "top_k": CYCLE})
        assert ranked_pairs(reply) == wanted
        assert reply.body["fallback"] is True


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("rank", {}, ["history", "user_id"]),
        ("rank", {"history": [], "user_id": "005"}, ["history", "user_id"]),
        ("rank", {"history": "03"}, ["history"]),
        ("rank", {"history": ["03", 1.5]}, ["history[1]", "whole number"]),
        ("rank", {"history": ["03", True]}, ["history[1]", "whole number"]),
        ("rank", {"user_id": "nobody"}, ["user_id", "'nobody'"]),
        ("rank", {"user_id": "\ud800"}, ["user_id", "half a character"]),
        ("rank", {"history": ["03"], "top_k": 0}, ["top_k", "1"]),
        ("rank", {"history": ["03"], "top_k": "5"}, ["top_k"]),
        ("rank", {"history": ["03"], "topk": 5}, ["topk", "no field"]),
        ("rank", {"history": ["03"], "candidates": ["nothing"]}, ["candidates", "none of the 1"]),
        ("rank", {"history": ["03"], "candidates": []}, ["candidates"]),
        ("score", {"history": ["03"]}, ["candidates"]),
        ("score", b"{", ["JSON"]),
        ("score", b"[1]", ["body", "JSON object"]),
        ("rank", b"[" * 100_000, ["JSON", "nested"]),
        ("rank", b'{"history": ["\xe9"]}', ["JSON", "UTF-8"]),
        ("rank", {"history": [1.5] * 100_000}, ["history[0]", "whole number"]),
    ],
)
def test_a_wrong_request_gets_a_sentence(client: Client, path: str, body: Any, words: list[str]) -> None:
    reply = client.post(f"/v1/{path}", body)
    assert reply.status == 422, reply
    assert list(reply.body) == ["error"]
    assert all(word in reply.body["error"] for word in words), reply.body
    assert len(reply.body["error"].splitlines()) == 1


def test_a_body_of_another_type_is_told_the_header(client: Client) -> None:
    """A page of another site can send text without asking, and no JSON."""
    for header in ({}, {"content-type": "text/plain"}):
        reply = client.send("POST", "/v1/rank", b'{"history": ["03"]}', header)
        assert (reply.status, "content-type: application/json" in reply.body["error"]) == (422, True)


def test_a_model_without_numbers_fails_and_is_not_taken_for_unknown_items(run: Path) -> None:
    class Broken:
        def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
            return [np.full(len(items), np.nan) for items in candidates]

    engine = Engine(open_data(load_saved(run / "config.yaml").data), nullcontext(Broken()))
    some = np.asarray([1, 2], dtype=np.int32)
    for query in (Query(some, None, 3), Query(some, some, 3), Query(some, some)):
        assert isinstance(engine.answer([query]).each[0], Failure)
    assert isinstance(engine.answer([Query(some[:0], None, 3)]).each[0], Answer), "popularity needs no model"


def test_the_first_wrong_name_is_enough() -> None:
    with pytest.raises(ValidationError) as fault:
        RankQuestion.model_validate({"history": ["03", *[1.5] * 1000]})
    assert {error["loc"][1] for error in fault.value.errors()} == {1}


def test_half_a_character_in_a_name_is_an_unknown_item(client: Client) -> None:
    reply = client.post("/v1/rank", b'{"history": ["\\ud800", "03"], "top_k": 1}')
    assert (reply.status, reply.body["unknown_history"]) == (200, 1)


def test_a_body_has_a_limit_with_and_without_its_length(client: Client) -> None:
    large = b'{"history": ["' + b"x" * MOST_BYTES + b'"]}'
    assert client.post("/v1/rank", large).status == 413
    parts = iter([large[: MOST_BYTES // 2], large[MOST_BYTES // 2 :]])  # http.client sends an iterable in chunks
    reply = client.send("POST", "/v1/rank", parts, {"content-type": "application/json"})  # type: ignore[arg-type]
    assert (reply.status, "error" in reply.body) == (413, True)
    assert client.post("/v1/rank", {"history": ["03"]}).status == 200


def test_a_page_of_another_site_cannot_ask_by_a_name_that_leads_here(client: Client) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert client.get("/v1/model", Host=host).status == 421, host
    for host in ("localhost", f"localhost:{client.port}", "127.0.0.1", "[::1]:80"):
        assert client.get("/v1/model", Host=host).status == 200, host


def test_a_token_is_asked_for_and_never_shown(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n", encoding="ascii")
    with caplog.at_level("DEBUG"), serving(run, token_file=tmp_path / "token") as client:
        for path in ("/v1/model", "/v1/items?q=film", "/metrics"):
            for token in (None, "wrong", TOKEN[:-1], f"{TOKEN}x", "\xe9" * 20):
                reply = Client(client.port, token).get(path)
                assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer"), path
            assert Client(client.port, TOKEN).get(path).status == 200
        assert client.get("/v1/model", Authorization=f"Basic {TOKEN}").status == 401
        assert [client.get(path).status for path in ("/", "/healthz", "/docs", "/openapi.json")] == [200] * 4
    assert TOKEN not in caplog.text


def test_pages_need_nothing_from_elsewhere_and_set_titles_as_text(client: Client) -> None:
    for path in ("/", "/page.js", "/page.css", "/docs", "/docs.js"):
        reply = client.get(path)
        assert reply.status == 200
        assert not re.search(r"https?://|//\w", re.sub(r"^\s*//.*|\s// .*", "", reply.body, flags=re.MULTILINE)), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", reply.body), path
        assert "default-src 'self'" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"


def test_the_api_describes_itself(run: Path, client: Client) -> None:
    described = client.get("/openapi.json").body
    assert {"/v1/rank", "/v1/score", "/v1/items", "/v1/model", "/healthz", "/metrics"} <= described["paths"].keys()
    assert client.get("/nothing").status == 404
    assert client.get("/v1/rank").status == 405
    model = client.get("/v1/model").body
    assert (model["name"], model["num_items"], model["members"]) == (run.name, CYCLE, [])
    assert client.get("/healthz").body == {"status": "ok", "model": model["model"]}
    assert str(run.parent) not in json.dumps(model)


def test_items_are_found_by_words_and_by_id(client: Client) -> None:
    found = client.get("/v1/items?q=fILM+b").body["items"]
    assert found == [{"item_id": raw_item(1), "title": title(1)}]
    assert client.get(f"/v1/items?q={raw_item(3)}").body["items"] == [{"item_id": raw_item(3), "title": title(3)}]
    assert len(client.get("/v1/items?q=film").body["items"]) == CYCLE
    assert client.get("/v1/items?q=%20").body["items"] == []
    assert client.get("/v1/items").status == 422


def test_popularity_without_a_run(run: Path, tmp_path: Path) -> None:
    with serving(run / "config.yaml", "evaluate.ranker=popularity", f"train.run_dir={tmp_path / 'none'}") as client:
        reply = client.post("/v1/rank", {"history": ["03"], "top_k": CYCLE})
        assert [item for item, _ in ranked_pairs(reply)] == [item for item, _ in ranked(run, [], top_k=CYCLE) if item != "03"]


def test_the_benchmark_counts_answers_and_failures(run: Path, client: Client) -> None:
    bodies = benchmark.questions(run, 5)
    assert len(bodies["catalogue"]) == 5
    before = benchmark.counters(client.port)
    answers = benchmark.load(client.port, bodies["catalogue"], 3, seconds=60.0, most=25)
    assert (len(answers.seconds), len(answers.done), answers.failed) == (25, 25, 0)
    after = benchmark.counters(client.port)
    assert after["requests"] - before["requests"] == 25
    assert 1 <= after["batches"] - before["batches"] <= 25
    assert after["prompts"] == after["kept"] == 0  # no language model
    assert benchmark.load(client.port, [b"{}"], 2, seconds=60.0, most=5).failed == 5
