"""A Hugging Face Hub on this machine's loopback that takes uploads: what huggingface_hub asks to make a repository and a commit.

Large files come by LFS, the others in the commit. It checks tokens, sizes and hashes, and keeps what was committed.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from hub_server import TOKEN
from loopback import loopback

COMMIT = "c0" * 20


@dataclass
class Uploads:
    """repositories: id -> whether it is private. files: id -> name -> content of its one commit. objects: by SHA-256."""

    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    cards: list[str] = field(default_factory=list)
    endpoint: str = ""


@contextmanager
def taking_uploads() -> Iterator[Uploads]:
    """Serves a hub without repositories inside the block."""
    hub = Uploads()

    class Handler(_Handler):
        served = hub

    with loopback(Handler) as hub.endpoint:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    served: Uploads
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        self._send(404, {"error": "nothing to read here"})

    def do_PUT(self) -> None:
        content, name = self._body(), urlsplit(self.path).path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != name:
            return self._send(400, {"error": "another hash"})
        self.served.objects[name] = content
        return self._send(200, {})

    def do_POST(self) -> None:
        body, path = self._body(), urlsplit(self.path).path
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.served.repositories:
                return self._send(409, {"error": "You already created this model repo"})
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.served.repositories[name] = private
            return self._send(200, {"url": f"{self.served.endpoint}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            self.served.cards.append(json.loads(body)["content"])
            return self._send(200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self._send(200, {"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]})
        repository, _, verb = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if repository not in self.served.repositories:
            return self._send(404, {"error": "Repository not found"})
        if verb == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        assert verb == "commit", path
        self.served.files[repository] = dict(filter(None, (self._committed(json.loads(line)) for line in body.splitlines())))
        address = f"{self.served.endpoint}/{repository}/commit/{COMMIT}"
        return self._send(200, {"success": True, "commitOid": COMMIT, "commitUrl": address})

    def _place(self, asked: dict[str, object]) -> dict[str, object]:
        return {**asked, "actions": {"upload": {"href": f"{self.served.endpoint}/objects/{asked['oid']}"}}}

    def _committed(self, line: dict[str, dict[str, str]]) -> tuple[str, bytes] | None:
        value = line["value"]
        if str(line["key"]) == "file":
            return value["path"], base64.b64decode(value["content"])
        if str(line["key"]) == "lfsFile":
            content = self.served.objects[value["oid"]]
            assert len(content) == int(value["size"])
            return value["path"], content
        return None

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _send(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
