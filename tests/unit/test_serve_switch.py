"""Another model takes the place of the one that is served, under load, and no request fails."""

import shutil
import threading
import time
from pathlib import Path

import pytest
from finished_runs import CYCLE, finished_run, other_run, point, raw_item
from http_clients import Client, assert_same_list, ranked_pairs, serving, until

import rec_dist


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
