"""A server of `rec-dist serve` in this process, and a plain HTTP client. Cost: a start takes as long as loading the model."""

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.commands.serve import ServeOptions, running


@dataclass
class Reply:
    """An answer. body: the JSON value, or the text where it is none."""

    status: int
    headers: Mapping[str, str]
    body: Any


@dataclass
class Client:
    """Asks the server at `port`, with a connection for each request."""

    port: int
    token: str | None = None

    def send(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}) -> Reply:
        """The answer to one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        allowed = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        try:
            connection.request(method, path, body, {**allowed, **headers})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        names = {name.lower(): value for name, value in answer.headers.items()}
        is_json = names.get("content-type", "").startswith("application/json")
        return Reply(answer.status, names, json.loads(text) if is_json else text)

    def get(self, path: str, **headers: str) -> Reply:
        """GET."""
        return self.send("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """POST of a JSON value, or of bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, {"content-type": "application/json", **headers})


@contextmanager
def serving(target: Path | str, *overrides: str, token: str | None = None, **options: Any) -> Iterator[Client]:
    """Serves in this process, without Ray, at any free port."""
    with running(Path(target), ["cluster.launcher=local", *overrides], ServeOptions(port=0, **options)) as server:
        yield Client(server.port, token)


def ranked_pairs(reply: Reply) -> list[tuple[str, float]]:
    """(item_id, score) in the order of a list."""
    assert reply.status == 200, reply
    assert [item["rank"] for item in reply.body["items"]] == list(range(1, len(reply.body["items"]) + 1))
    return [(item["item_id"], item["score"]) for item in reply.body["items"]]


def assert_same_list(found: Sequence[tuple[str, float]], wanted: Sequence[tuple[str, float]]) -> None:
    """The same scores to 1e-4, and the same order but for items whose scores are closer than that."""
    assert len(found) == len(wanted)
    scores = dict(wanted)
    for (item, score), (_, at_rank) in zip(found, wanted, strict=True):
        assert abs(score - at_rank) < 1e-4
        assert item not in scores or abs(scores[item] - score) < 1e-4


def until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    """Waits until the condition holds; fails when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
