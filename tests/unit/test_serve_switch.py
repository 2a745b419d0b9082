"""Another model takes the place of the one that is served, under load, and no request fails."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import CYCLE, finished_run, items_of, other_run, point, raw_item
from http_clients import Client, assert_same_list, ranked_pairs, serving, until

import rec_dist
from rec_dist.config.load import load_saved
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.models.prompt_cache import PromptCounts
from rec_dist.serving.app import Routes
from rec_dist.serving.batcher import Limits
from rec_dist.serving.engine import Answer, Outcomes, Query
from rec_dist.serving.messages import ProblemError, RankQuestion
from rec_dist.serving.metrics import Metrics
from rec_dist.serving.served import Loaded
from rec_dist.serving.switch import Switch


def test_a_link_to_another_run_is_taken_up_without_a_failed_request(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one")
    other = other_run(run, tmp_path / "other")
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    next((broken / "model").glob("*.safetensors")).write_bytes(b"damaged")
    body = {"history": [raw_item(3), raw_item(4)], "top_k": CYCLE}
    wanted = {
        path: [(row["item_id"], row["score"]) for row in rec_dist.rank(path, {"u": body["history"]}, top_k=CYCLE).to_pylist()]
        for path in (run, other)
    }
    assert max(abs(a[1] - b[1]) for a, b in zip(*wanted.values(), strict=True)) > 1e-2, "two models"
    link = tmp_path / "current"
    link.symlink_to(run)
    with serving(link) as client:
        first = client.get("/v1/model").body["model"]
        stop, faults, counts = threading.Event(), [], {"before": 0, "after": 0}

        def ask() -> None:
            try:
                while not stop.is_set():
                    reply = client.post("/v1/rank", body)
                    new = reply.status == 200 and reply.body["model"] != first
                    assert_same_list(ranked_pairs(reply), wanted[other if new else run])
                    counts["after" if new else "before"] += 1
            except BaseException as fault:
                faults.append(fault)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: counts["before"] > 5 or bool(faults))
            point(link, broken)
            until(lambda: 'models_total{outcome="refused"} 1.0' in client.get("/metrics").body or bool(faults))
            assert client.get("/v1/model").body["model"] == first
            point(link, other)
            until(lambda: counts["after"] > 5 or bool(faults))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not faults, faults[0]
        assert client.get("/v1/model").body["model"] != first
        assert 'models_total{outcome="taken"} 1.0' in client.get("/metrics").body


@pytest.mark.slow
def test_a_run_that_is_not_finished_again_goes_on(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one")
    with serving(run) as client:
        finished = run / "finished.json"
        kept = finished.read_bytes()
        finished.unlink()
        time.sleep(2.5)
        assert ranked_pairs(client.post("/v1/rank", {"history": [raw_item(3)]}))
        finished.write_bytes(kept)
        until(lambda: 'models_total{outcome="taken"} 1.0' in client.get("/metrics").body)
        assert ranked_pairs(Client(client.port).post("/v1/rank", {"history": [raw_item(3)]}))


class Instant:
    """Replicas that answer at once, with the history."""

    count = 1

    def __init__(self) -> None:
        self.closed = False

    async def answer(self, queries: list[Query]) -> Outcomes:
        return Outcomes([Answer(query.history, np.zeros(len(query.history)), {}, False) for query in queries], PromptCounts())

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("served"))


def loaded(run: Path, replicas: Instant, model: str, *, most_titles: int | None = None) -> Loaded:
    return Loaded(open_data(load_saved(run / "config.yaml").data), replicas, {"model": model}, False, most_titles)


def switched(run: Path, first: Loaded, load: Callable[[], Loaded]) -> Switch:
    """A switch that takes up what `load` gives as soon as it has started."""
    return Switch(first, load, Limits(10, 1.0), Metrics(), run=run, seen=None, every_seconds=0.01)


def test_a_request_that_still_looks_for_its_user_is_answered_by_the_model_that_it_began_with(run: Path) -> None:
    async def test() -> None:
        old, found, going = Instant(), threading.Event(), threading.Event()
        switch = switched(run, loaded(run, old, "old"), lambda: loaded(run, Instant(), "new"))
        users = switch.now.users

        class Slow:
            def history(self, user: str) -> Any:
                going.set()
                assert found.wait(10)
                return users.history(user)

        switch.now.users = Slow()  # type: ignore[assignment]
        asked = asyncio.create_task(Routes(switch, Metrics()).rank(RankQuestion(user_id="005")))
        await asyncio.to_thread(going.wait, 10)
        switch.start()
        while switch.now.about["model"] == "old":
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not old.closed
        found.set()
        reply = await asked
        assert (reply.model, [item.item_id for item in reply.items]) == ("old", [raw_item(item) for item in items_of(5)])
        while not old.closed:
            await asyncio.sleep(0.01)
        await switch.close()

    asyncio.run(asyncio.wait_for(test(), 30))


def test_an_old_model_that_does_not_end_is_a_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Instant):
        def close(self) -> None:
            raise TimeoutError("still there\nafter 60 s")

    async def test() -> None:
        switch = switched(run, loaded(run, Stuck(), "old"), lambda: loaded(run, Instant(), "new"))
        switch.start()
        while "did not end" not in caplog.text:
            await asyncio.sleep(0.01)
        assert "the scorers of model old did not end: still there after 60 s" in caplog.text
        await switch.close()

    with caplog.at_level("WARNING", logger="rec_dist"):
        asyncio.run(asyncio.wait_for(test(), 30))


def test_replicas_that_nobody_will_use_are_ended(run: Path) -> None:
    """A data set that cannot be indexed, and a server that ended while they loaded: on a cluster they would stay."""
    broken = Instant()
    with pytest.raises(AttributeError):
        switched(run, replace(loaded(run, broken, "old"), data=None), lambda: loaded(run, Instant(), "new"))  # type: ignore[arg-type]
    assert broken.closed
    late, loading, ended = Instant(), threading.Event(), threading.Event()

    def load() -> Loaded:
        loading.set()
        assert ended.wait(10)
        return loaded(run, late, "new")

    async def test() -> None:
        switch = switched(run, loaded(run, Instant(), "old"), load)
        switch.start()
        await asyncio.to_thread(loading.wait, 10)
        await switch.close()
        ended.set()

    asyncio.run(asyncio.wait_for(test(), 30))
    assert late.closed


@pytest.mark.parametrize("candidates", [None, [raw_item(number) for number in range(4)]])
def test_a_request_for_too_many_titles_is_refused(run: Path, candidates: list[str] | None) -> None:
    async def test() -> None:
        routes = Routes(
            switched(run, loaded(run, Instant(), "old", most_titles=3), lambda: loaded(run, Instant(), "new")), Metrics()
        )
        with pytest.raises(ProblemError, match=r"^candidates: .* 3 titles") as fault:
            await routes.rank(RankQuestion(history=[raw_item(1)], candidates=candidates))
        assert fault.value.status == 422

    asyncio.run(asyncio.wait_for(test(), 30))
