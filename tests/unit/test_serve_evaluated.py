"""What is served is what `rec-dist evaluate` measured, for runs of every kind: the same scores of the same candidates.

Many users ask at once, so their requests are scored in batches that evaluation never made.
"""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_clients import Client, assert_same_list, ranked_pairs, serving

import rec_dist
from rec_dist.data.artifacts.predictions import Predictions

Make = Callable[..., dict[str, Any]]
Case = tuple[list[str], list[str], list[float]]  # history, candidates, scores


@pytest.fixture(scope="module")
def runs(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, rec_dist.Run]:
    """A finished run of each kind on the same data."""
    folder = tmp_path_factory.mktemp("runs")
    plain = "adapter.kind=none"
    made = {
        "sequential": rec_dist.train(tiny_config(folder / "sequential", "task.kind=sequential", plain)),
        "neighbours": rec_dist.train(tiny_config(folder / "neighbours", "task.kind=neighbours", plain)),
        "language_model": rec_dist.train(tiny_config(folder / "sft", "task.kind=sft")),
    }
    members = {f"task.ensemble.members.{name}": str(run.path) for name, run in made.items()}
    made["ensemble"] = rec_dist.train(
        tiny_config(folder / "ensemble", "task.kind=ensemble", plain, "task.ensemble.num_candidates=10", members)
    )
    return made


def evaluated(run: rec_dist.Run) -> list[Case]:
    """What `rec-dist evaluate` wrote, in the names of the source."""
    rec_dist.evaluate(run)
    data, predictions = rec_dist.prepare(run.config), Predictions.read(run.path / "predictions.arrow")
    split = data.split("test")
    row_of = {user: row for row, user in enumerate(split.user_ids.tolist())}
    cases = []
    for user, position, items, scores in zip(
        predictions.user_ids.tolist(), predictions.positions.tolist(), predictions.candidates, predictions.scores, strict=True
    ):
        history = split.items_of(row_of[user])[:position]
        names = lambda chosen: [data.raw_items[item] for item in np.asarray(chosen).tolist()]
        cases.append((names(history), names(items), [float(score) for score in scores]))
    return cases


def ask_all(client: Client, cases: list[Case], run: rec_dist.Run) -> Iterator[None]:
    """Every user's scores and list, with other requests between them, from eight threads at once."""
    ensemble = bool(client.get("/v1/model").body["members"])

    def ask(case: Case) -> None:
        history, candidates, wanted = case
        reply = client.post("/v1/score", {"history": history, "candidates": candidates, "members": ensemble})
        assert reply.status == 200, reply
        assert reply.body["scores"] == pytest.approx(wanted, abs=1e-4)
        if ensemble:
            assert np.sum(list(reply.body["members"].values()), axis=0) == pytest.approx(wanted, abs=1e-4)
        reply = client.post(
            "/v1/rank", {"history": history, "candidates": candidates, "exclude_seen": False, "members": ensemble}
        )
        best = sorted(zip(candidates, wanted, strict=True), key=lambda pair: -pair[1])
        assert_same_list(ranked_pairs(reply), best)
        if ensemble:
            for item in reply.body["items"]:
                assert sum(item["members"].values()) == pytest.approx(item["score"], abs=1e-6)
        assert client.post("/v1/rank", {"history": history[:2], "top_k": 3}).status == 200

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(ask, cases)


@pytest.mark.parametrize("kind", ["sequential", "neighbours", "language_model", "ensemble"])
def test_served_scores_are_evaluated_scores(runs: dict[str, rec_dist.Run], kind: str) -> None:
    run = runs[kind]
    cases = evaluated(run)
    assert len(cases) == 20
    random.Random(0).shuffle(cases)
    with serving(run.path) as client:
        list(ask_all(client, cases, run))
        members = client.get("/v1/model").body["members"]
    assert members == (["sequential", "neighbours", "language_model"] if kind == "ensemble" else [])


def test_a_question_that_the_model_refuses_does_not_harm_its_neighbours(tiny_config: Make, tmp_path: Path) -> None:
    """A prompt that lists three candidates takes three. Others in the same batch get their answers."""
    changes = ("prompt.candidates=listed", "prompt.num_candidates=3", "evaluate.num_candidates=3")
    run = rec_dist.train(tiny_config(tmp_path / "run", "task.kind=sft", *changes))
    with serving(run.path) as client:

        def ask(number: int) -> int:
            candidates = ["i020", "i003", "i070", "i044"][: 3 + number % 2]
            reply = client.post("/v1/score", {"history": ["i003", "i010"], "candidates": candidates})
            assert reply.status == 200 or "prompt.num_candidates is 3" in reply.body["error"], reply
            return reply.status

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, range(12))) == [200, 422] * 6
