"""A request that the model fails on fails alone: whatever is in the batch with it gets its answer."""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import finished_run, raw_item
from http_clients import serving

from rec_dist.config.load import load_saved
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import Floats
from rec_dist.launch.replicas_on_ray import _Replica
from rec_dist.runtime.arrays import I32
from rec_dist.serving.engine import Answer, Engine, Failure, Query, Refusal

POISON, SPREAD = 5, 6  # items of a history


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def data(run: Path) -> PreparedData:
    return open_data(load_saved(run / "config.yaml").data)


def no_number(_: int) -> Floats:
    return np.asarray([np.nan])


def refused(_: int) -> Floats:
    raise UserError("no such thing")


def broken(_: int) -> Floats:
    raise RuntimeError("broken\nin two lines")


class Poisoned:
    """Scores an item by the sum of the history and its number, unless POISON is in a history; SPREAD spoils all of its batch."""

    def __init__(self, fault: Callable[[int], Floats]) -> None:
        self.fault, self.calls = fault, 0

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        self.calls += 1
        scores = [items + float(history.sum()) for history, items in zip(histories, candidates, strict=True)]
        for place, history in enumerate(histories):
            if POISON in history:
                scores[place] = scores[place] + self.fault(place)
        return [own + np.nan for own in scores] if any(SPREAD in history for history in histories) else scores


def query(*history: int) -> Query:
    return Query(np.asarray(history, dtype=np.int32), np.asarray([1, 2, 3], dtype=np.int32))


@pytest.mark.parametrize("fault", [no_number, refused, broken])
@pytest.mark.parametrize("poisoned", [[], [0], [3], [8], [0, 1, 8], list(range(9))])
def test_every_other_question_of_a_batch_is_answered(
    data: PreparedData, fault: Callable[[int], Floats], poisoned: list[int]
) -> None:
    scorer = Poisoned(fault)
    queries = [query(1, 2, POISON) if place in poisoned else query(place % 4) for place in range(8)] + [query()]
    if 8 in poisoned:
        queries[7], poisoned = query(POISON), sorted({*poisoned, 7} - {8})
    outcomes = Engine(data, nullcontext(scorer)).answer(queries).each
    for place, outcome in enumerate(outcomes):
        if place in poisoned:
            assert isinstance(outcome, Refusal if fault is refused else Failure), place
            assert len(outcome.sentence.splitlines()) == 1
        else:
            assert isinstance(outcome, Answer), place
            assert outcome.fallback is (place == 8)
            if place < 8:
                assert outcome.scores.tolist() == [1 + place % 4, 2 + place % 4, 3 + place % 4]
    assert scorer.calls <= 1 + 2 * 3 * len(poisoned)


def test_a_question_that_spoils_others_is_found(data: PreparedData) -> None:
    """As where attention is one dense mask for all of a batch."""
    engine = Engine(data, nullcontext(Poisoned(no_number)))
    outcomes = engine.answer([query(1), query(SPREAD), query(2), query(3)]).each
    assert [type(outcome) for outcome in outcomes] == [Answer, Failure, Answer, Answer]


def test_a_request_without_a_number_gets_500_and_its_neighbours_their_answers(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real run whose embedding of the third position is no number."""
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "bad"
    shutil.copytree(run, bad)
    (weights,) = (bad / "model").glob("*.safetensors")
    state = load_file(weights)
    state["positions.weight"][2] = torch.nan
    save_file(state, weights)
    listed = [raw_item(item) for item in (1, 2, 3)]

    def ask(client: Any, number: int) -> tuple[int, Any]:
        history = [raw_item(item) for item in ((1, 2, 3) if number % 3 == 0 else (1, 2))]
        reply = client.post("/v1/score", {"history": history, "candidates": listed})
        return reply.status, reply.body

    with serving(run) as client:
        _, wanted = ask(client, 1)
    with serving(bad) as client, ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda number: ask(client, number), range(60)))
    for number, (status, body) in enumerate(replies):
        assert status == (500 if number % 3 == 0 else 200)
        if status == 200:
            assert body["scores"] == pytest.approx(wanted["scores"], abs=1e-4)
        else:
            assert "log" in body["error"]
    assert "no number (NaN)" in caplog.text


def test_a_replica_that_could_not_read_its_files_when_it_was_started_again_loads_them_later(data: PreparedData) -> None:
    there: list[bool] = []

    def load(device: str) -> Engine:
        if not there:
            raise UserError(f"no files for {device}")
        return Engine(data, nullcontext(Poisoned(broken)))

    replica = _Replica(load, "cpu")
    assert replica.fault() == "no files for cpu"
    with pytest.raises(RuntimeError, match="no files for cpu"):
        replica.answer([query(1)])
    there.append(True)
    assert isinstance(replica.answer([query(1)]).each[0], Answer)
