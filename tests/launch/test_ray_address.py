"""Which Ray cluster `rec-dist submit` asks, and what a user reads when something else answers. Needs no cluster."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from test_rendering import CONFIG, rendered

from rec_dist.cli import main


def test_the_address_that_would_be_used_is_shown_and_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://other:8265")
    assert (
        json.loads(rendered("ray", "submit.ray.address=null").partition("\n\n# config.yaml")[0])["address"]
        == "https://other:8265"
    )
    words = ["submit", str(CONFIG), "--to", "ray", "--dry-run"]
    capsys.readouterr()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert [words for words in ("submit.ray.address (", "RAY_API_SERVER_ADDRESS (", "unset one") if words not in err] == []
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "other:8265")
    for ask in (words, ["submit", "--follow", "x"], ["submit", "--stop", "x"]):
        assert main(ask) == 2
        assert "RAY_API_SERVER_ADDRESS (other:8265)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--follow", "x"], ["--stop", "x"], ["--to", "ray"]])
def test_overrides_without_a_config_are_named_as_such(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *words, "submit.ray.address=http://h:8265"]) == 2
    assert "submit.ray.address=... is an override, and no CONFIG stands before it" in capsys.readouterr().err


class _Odd(BaseHTTPRequestHandler):
    """Something that is not a job server. The test sets its answers."""

    def do_GET(self) -> None:
        status, text = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "answer", [(404, b""), (200, b"<html>a proxy</html>"), (200, b"{}"), (403, b"who are you"), (401, b"no token"), None]
)
def test_whatever_answers_instead_of_a_job_server_is_one_line(
    answer: tuple[int, bytes] | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None means that nobody listens."""
    server = HTTPServer(("127.0.0.1", 0), _Odd)
    server.answer = answer  # type: ignore[attr-defined]
    if answer is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    try:
        assert main(["submit", "--follow", "job-1"]) == 2
    finally:
        if answer is not None:
            server.shutdown()
            server.server_close()
    err = capsys.readouterr().err
    assert err.startswith(f"error: no job server answers at {address}: ")
    assert len(err.splitlines()) == 1
