"""The HTTP server: a bound socket, and a thread that answers on it until it is asked to stop."""

import errno
import logging
import os
import socket
import threading
import time
from typing import Any

import uvicorn

from rec_dist.errors import UserError


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address, which nobody can connect to yet.

    Raises UserError if the host is unknown, or the port is taken or not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as fault:
        raise UserError(f"--host ({host}) is no address of this machine ({fault}); give 127.0.0.1 or 0.0.0.0") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        if port:
            _refuse_listener(str(address[0]), port, family)
    except OSError as fault:
        bound.close()
        why = "is in use" if fault.errno == errno.EADDRINUSE else f"cannot be used ({os.strerror(fault.errno or 0)})"
        raise UserError(f"--port ({port}) {why} on {host}; choose another, or 0 for any that is free") from None
    return bound


def _refuse_listener(host: str, port: int, family: int) -> None:
    """Raises OSError if a server listens there: with SO_REUSEADDR some systems let a second one bind."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((host, port)) == 0:
            raise OSError(errno.EADDRINUSE, "in use")


class Server:
    """Serves an ASGI application on a bound socket.

    drain_seconds: how long stop() waits for requests that have begun. The application's own end comes after that.
    """

    def __init__(self, app: Any, bound: socket.socket, *, drain_seconds: float) -> None:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # the application says what went wrong, in one line
        config = uvicorn.Config(
            app,
            loop="asyncio",
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(drain_seconds),
        )
        self._server, self._bound = uvicorn.Server(config), bound
        # In a thread, where uvicorn leaves the signals alone: it would end the process by the signal that stopped it.
        self._thread = threading.Thread(target=self._server.run, args=([bound],), name="server", daemon=True)

    @property
    def port(self) -> int:
        """The port, also if 0 was asked for."""
        port: int = self._bound.getsockname()[1]
        return port

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begins to answer. Raises RuntimeError if the application does not start."""
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)

    def stop(self) -> None:
        """Takes no more connections, answers every request that has begun, and ends the application."""
        self._server.should_exit = True
        self._thread.join()
