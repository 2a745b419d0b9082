"""What every request passes before a route sees it: the host it asks for, the token, the size and speed of its body.

An ASGI middleware, so that nothing of a request is read before it is allowed.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from rec_dist.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BYTES = 1 << 20  # of a body: 100,000 ids of 8 characters
_DRAINED_BYTES = 8 * MOST_BYTES
_BODY_SECONDS = 30.0  # for each part of a body
_PROTECTED = ("/v1/", "/metrics")
_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


@dataclass(frozen=True)
class Access:
    """token: what a caller must send, None for none. only_local: only requests that name this machine as their host.

    A page of another site may reach a server on 127.0.0.1 by a name of its own that leads there; such a request names that site.
    """

    token: str | None
    only_local: bool


class Guard:
    """The middleware. routes: the paths that the metrics tell apart."""

    def __init__(self, app: App, access: Access, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._metrics, self._routes, self._only_local = app, metrics, routes, access.only_local
        self._digest = None if access.token is None else hashlib.sha256(access.token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                if refusal[0] == 413:
                    await _drained(receive)
                await _refuse(sent, *refusal)
            else:
                await self._app(scope, _limited(receive), sent)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        if self._only_local and not is_local(_host_of(headers.get(b"host", b"").decode("latin-1"))):
            return 421, "this server answers to localhost only; ask for 127.0.0.1, or start it with --host"
        if self._digest is not None and scope["path"].startswith(_PROTECTED):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            matches = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._digest)
            if scheme.lower() != b"bearer" or not matches:
                return 401, "send the header `Authorization: Bearer TOKEN` with the token of this server"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > MOST_BYTES:
            return 413, _TOO_LARGE
        return None


_TOO_LARGE = f"the body has more than {MOST_BYTES:,} bytes; send fewer candidates or a shorter history"


def is_local(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(header: str) -> str:
    """The header Host without its port: `[::1]:80` and `localhost:80` have one."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _limited(receive: Receive) -> Receive:
    """Receives a body of at most MOST_BYTES, each part within _BODY_SECONDS."""
    size, more = 0, True

    async def limited() -> MutableMapping[str, Any]:
        nonlocal size, more
        try:
            message = await asyncio.wait_for(receive(), _BODY_SECONDS if more else None)
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from None
        if message["type"] == "http.request":
            size, more = size + len(message.get("body", b"")), bool(message.get("more_body", False))
            if size > MOST_BYTES:
                if more:
                    await _drained(receive)
                raise HTTPException(413, _TOO_LARGE)
        return message

    return limited


async def _drained(receive: Receive) -> None:
    """Reads on for a while: a client whose connection is closed while it sends does not see the answer."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_BODY_SECONDS):
            while size < _DRAINED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
