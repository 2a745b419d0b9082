"""A Hugging Face Hub on this machine's loopback for tests: models in a folder. One is gated, and one needs a token.

It answers what huggingface_hub asks for: the commit of a revision, the files of a commit, and their contents.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from loopback import loopback

TOKEN = "hf_a-token-of-the-tests"


@dataclass
class Hub:
    """repositories: id -> revision -> (commit, folder). requests: method and path of each request so far."""

    repositories: dict[str, dict[str, tuple[str, Path]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, repository: str, folder: Path, *revisions: str) -> str:
        """Serves `folder` as main and under `revisions`; returns its commit."""
        commit = hashlib.sha1(f"{repository}{folder}".encode()).hexdigest()
        for name in ("main", commit, *revisions):
            self.repositories.setdefault(repository, {})[name] = (commit, folder)
        return commit

    def fetched(self) -> set[str]:
        """Names of the files that were downloaded."""
        return {line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line}


@contextmanager
def serving() -> Iterator[Hub]:
    """Serves a hub without models inside the block."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    with loopback(Handler) as hub.endpoint:
        yield hub


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that asks the hub at `endpoint` and keeps what it fetches in `home`."""
    left_out = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        **more,
    }


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.served.requests.append(f"{self.command} {path}")
        parts = [unquote(part) for part in path.strip("/").split("/")]  # a revision may hold a quoted slash
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository = "/".join(parts[:2])
        if repository not in self.served.repositories or (
            repository in self.served.private and self.headers.get("authorization") != f"Bearer {TOKEN}"
        ):
            return self._send(404 if "authorization" in self.headers else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if is_api and len(parts) == 2:
            parts = [*parts, "revision", "main"]
        kind, revision, name = parts[2], parts[3], "/".join(parts[4:])
        found = self.served.repositories[repository].get(revision)
        if found is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        commit, folder = found
        if kind == "revision":
            return self._json({"id": repository, "sha": commit, "siblings": [{"rfilename": n} for n in _names(folder)]})
        if kind == "tree":
            return self._json([_entry(folder, n) for n in _names(folder)])
        if repository in self.served.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if not (folder / name).is_file():
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = (folder / name).read_bytes()
        return self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, name: str) -> dict[str, object]:
    content = (folder / name).read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
