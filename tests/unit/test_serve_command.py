"""The command `rec-dist serve` in a process of its own: signals, and mistakes in one line with exit code 2."""

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from finished_runs import CYCLE, finished_run, raw_item
from http_clients import Client, Reply
from worker_processes import Child, run_command, start_command

_LOCAL = ("cluster.launcher=local", "--port", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("served"))


def client_of(child: Child) -> Client:
    """Waits until the command says where it serves."""
    deadline = time.monotonic() + 120
    while (found := re.search(r"serving \S+ at http://127\.0\.0\.1:(\d+)/", child.err)) is None:
        assert child.process.is_alive() and time.monotonic() < deadline, child.err
        time.sleep(0.02)
    return Client(int(found[1]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_has_begun_and_ends_with_0(run: Path, tmp_path: Path, number: signal.Signals) -> None:
    child = start_command(tmp_path, "serve", run, *_LOCAL)
    client = client_of(child)
    replies: list[Reply] = []
    refused = 0
    stop = threading.Event()

    def ask() -> None:
        """Every request gets a whole answer, or no connection at all."""
        nonlocal refused
        while not stop.is_set():
            try:
                replies.append(client.post("/v1/rank", {"history": [raw_item(3)], "top_k": CYCLE}))
            except ConnectionError:
                refused += 1
                time.sleep(0.01)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    # One request whose body is still on its way when the signal comes: it has begun, so it is answered.
    body = b'{"history": ["03"], "top_k": 3}'
    slow = socket.create_connection(("127.0.0.1", client.port))
    head = f"POST /v1/rank HTTP/1.1\r\nHost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    slow.sendall(head.encode() + body[:5])
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(replies) < 20:
        assert time.monotonic() < deadline and child.process.is_alive(), child.err
        time.sleep(0.01)
    assert child.process.pid is not None
    os.kill(child.process.pid, number)
    time.sleep(0.5)
    slow.sendall(body[5:])
    answer = b""
    while part := slow.recv(65536):
        answer += part
    slow.close()
    code = child.wait()
    stop.set()
    for thread in threads:
        thread.join()
    assert (code, {reply.status for reply in replies}) == (0, {200}), child.err
    assert answer.startswith(b"HTTP/1.1 200 ") and b'"rank":3' in answer
    assert refused
    assert "Traceback" not in child.err and "error" not in child.err


def test_a_second_ctrl_c_ends_it_at_once(run: Path, tmp_path: Path) -> None:
    """A request that has begun keeps the first one waiting, for 35 seconds at most."""
    child = start_command(tmp_path, "serve", run, *_LOCAL)
    with socket.create_connection(("127.0.0.1", client_of(child).port)) as slow:
        slow.sendall(b"POST /v1/rank HTTP/1.1\r\nHost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{")
        time.sleep(0.5)
        assert child.process.pid is not None
        os.kill(child.process.pid, signal.SIGINT)
        while "stopping" not in child.err:
            assert child.process.is_alive(), child.err
            time.sleep(0.02)
        time.sleep(1.0)
        assert child.process.is_alive(), "the request has begun"
        os.kill(child.process.pid, signal.SIGINT)
        began = time.monotonic()
        assert (child.wait(), time.monotonic() - began < 15) == (1, True), child.err


def error_of(child: Child) -> str:
    """The one line of a mistake."""
    lines = [line for line in child.err.splitlines() if line.startswith("error: ")]
    assert lines == child.err.splitlines()[-1:], child.err
    return lines[0]


def test_mistakes_are_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in run.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, child = run_command(tmp_path, "serve", run, "cluster.launcher=local", "--port", port)
        assert code == 2
        assert f"--port ({port}) is in use" in error_of(child)
    (tmp_path / "token").write_text("short", encoding="ascii")
    for words, found in (
        (("--port", "70000"), "--port (70000)"),
        (("--queue", "0"), "--queue (0)"),
        (("--deadline", "0"), "--deadline (0)"),
        (("--host", "no.such.host.invalid"), "--host (no.such.host.invalid)"),
        (("--token-file", tmp_path / "none"), "--token-file"),
        (("--token-file", tmp_path / "token"), "16 or more"),
    ):
        code, child = run_command(tmp_path / "log", "serve", run, *_LOCAL, *words)
        assert (code, found in error_of(child)) == (2, True), child.err
        assert "short" not in child.err
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_run_that_is_not_finished(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    code, child = run_command(tmp_path / "log", "serve", tmp_path / "run", *_LOCAL)
    assert (code, "is not finished" in error_of(child)) == (2, True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
