"""A Ray cluster: connecting to it, its nodes, whether its head answers, and how to end a group of workers."""

import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rec_dist.errors import StopRequested, UserError, one_line
from rec_dist.launch.restart import HeadLostError
from rec_dist.launch.sizing import Node
from rec_dist.runtime.heartbeat import Beat
from rec_dist.runtime.stacks import end_group

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_SETTINGS = b"\x04"  # the type of a frame of HTTP/2, its fourth byte
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + bytes(5)
_MOST_BYTES = 107 - 64  # /session_2026-11-30_19-15-26_123456_1234567/sockets/plasma_store
_LEAVE_SECONDS = 30.0  # to leave a cluster
_HEAD_SECONDS = 10.0  # the head may be restarting; Ray itself ends the driver after 60 s, without a useful message


def connect(address: str | None) -> None:
    """Joins the cluster at `address` or RAY_ADDRESS, or starts one on this machine.

    Raises UserError when no cluster answers, and StopRequested when a SIGTERM came meanwhile.
    """
    import ray

    if ray.is_initialized():
        return
    named = address_of(address)
    if named is None:
        _make_token()
    else:
        check_answers(named)
    # It logs at each start that it is on for a cluster of this machine, which is Ray's default.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Workers report through the run directory. Ray would repeat their output.
    try:
        ray.init(
            address=named or "local",  # None would join whatever cluster a file in /tmp names, which anybody may write
            include_dashboard=False if named is None else None,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
            _temp_dir=temp_folder() if named is None else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as fault:
        if named is None:
            raise
        raise UserError(
            f"cluster.address ({named}): no Ray cluster answers ({one_line(fault)}); start one, or unset it to use this machine"
        ) from fault
    except SystemExit as fault:  # from Ray's own handler of SIGTERM, which would end this process with 15 and no message
        raise StopRequested("stopped while Ray was starting; run the same command to go on") from fault


def address_of(address: str | None) -> str | None:
    """The cluster to join: `address` or else RAY_ADDRESS. None: one that starts on this machine, which `local` names as well."""
    named = address or os.environ.get("RAY_ADDRESS")
    return None if named in (None, "", "local") else named


def check_answers(address: str) -> None:
    """Raises UserError if no Ray head is at the HOST:PORT of `address`, within 30 s. Ray itself would wait for minutes.

    A head speaks gRPC, so it answers the first frame of HTTP/2 with one of settings.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # `auto`, or what Ray rejects at once
        return
    encrypted = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS) as head:
            if not encrypted:
                head.sendall(_GREETING)
                answer = head.recv(9)
                if answer[3:4] != _SETTINGS:
                    raise ConnectionError("what answers is no Ray head")
    except (OSError, OverflowError, UnicodeError) as fault:
        raise UserError(
            f"cluster.address ({address}): no Ray cluster answers there ({one_line(fault)}); give HOST:PORT of a running Ray head, "
            "or unset it and RAY_ADDRESS to use this machine"
        ) from fault


def temp_folder() -> str | None:
    """The folder for the sockets and logs of a Ray cluster on this machine; None: Ray's own choice.

    A path of a socket has up to 107 bytes, and Ray adds up to 64 to its folder. Raises UserError if no folder serves.
    """
    own = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    fault = _unusable(own)
    if fault is None:
        return None
    for other in ("/tmp/ray", "/var/tmp/ray", "/dev/shm/ray"):
        if _unusable(Path(other)) is None:
            logger.warning(f"Ray's temporary folder {own} {fault}; this cluster's sockets and logs are in {other}")
            return other
    raise UserError(f"Ray's temporary folder {own} {fault}; set RAY_TMPDIR to a writable folder of up to {_MOST_BYTES - 4} bytes")


def _unusable(folder: Path) -> str | None:
    """Why the sockets and logs of a cluster cannot be in `folder`, or None."""
    if (size := len(os.fsencode(folder))) > _MOST_BYTES:
        return f"has a path of {size} bytes, too long for the sockets in it"
    if not str(folder).isascii():
        return "has a path outside ASCII"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as fault:
        return f"cannot be written ({fault.strerror})"
    return None


def _make_token() -> None:
    """Gives this process, and the cluster that it starts, a token of their own, unless the user has named one.

    Ray would make one for all clusters that the user ever starts, and keep it in ~/.ray/auth_token.
    """
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not any(map(os.environ.get, names)):
        os.environ[names[0]] = secrets.token_hex(32)


@contextmanager
def disconnected() -> Iterator[None]:
    """At the end, this process is connected to Ray only if it was before. A cluster that was started inside ends with it."""
    before = _is_connected()
    try:
        yield
    finally:
        if not before:
            leave()


def leave() -> None:
    """Leaves the cluster, if this process is in one, and ends the one that it started."""
    if _is_connected():
        import ray

        # In a thread, because this may wait for a head that is dead.
        thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
        thread.start()
        thread.join(_LEAVE_SECONDS)


def _is_connected() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def nodes(leaving: Sequence[str] = (), *, asked: bool = True) -> list[Node]:
    """The resources of the nodes that are alive and not about to be taken away.

    asked: each node must accept a connection. Ray takes a node that has just died for alive for up to half a minute, and would
    place workers on it in vain.
    """
    import ray

    gone = {*leaving, *draining()}
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in gone]
    if not asked:
        return [node["Resources"] for node in alive]
    with ThreadPoolExecutor(max_workers=32) as pool:
        well = list(pool.map(lambda node: _answers((node["NodeManagerAddress"], int(node["NodeManagerPort"]))), alive))
    return [node["Resources"] for node, answers in zip(alive, well, strict=True) if answers]


def _answers(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=2.0):
            return True
    except OSError:
        return False


def draining() -> set[str]:
    """Nodes that are about to be taken away (preempted, or drained by hand), as Ray Train's own watcher finds them."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def end(beats: Sequence[Beat], folder: Path, stacks: Path | None) -> list[str]:
    """Calls end_group on every machine that a rank runs on: in a task there, and directly here."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    lines: list[str] = []
    tasks = {}
    task = ray.remote(num_cpus=0, max_retries=0)(end_group)
    for node in sorted({beat.node for beat in beats} - {here}):
        group = [beat for beat in beats if beat.node == node]
        pinned = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        tasks[node] = pinned.remote(group, folder, stacks)
    for node, answer in tasks.items():  # before the ranks here are dead, because the others fail when they find them gone
        try:
            lines += ray.get(answer, timeout=60.0)
        except (GetTimeoutError, RayError) as fault:
            lines.append(f"node {node} does not answer ({type(fault).__name__}); its workers are left to Ray")
    return lines + end_group([beat for beat in beats if beat.node == here], folder, stacks)


class Head:
    """Whether the cluster's head still answers. Ray's own calls would wait for a dead head, and then end this process."""

    def __init__(self) -> None:
        import ray

        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._address = (host.strip("[]"), int(port))
        self._well = self._asked = time.monotonic()
        self._reachable = True
        self._reachable = self.answers()  # a head that never accepted a plain connection is not judged by one

    def check(self) -> None:
        """Raises HeadLostError when the head has not answered for _HEAD_SECONDS."""
        now = time.monotonic()
        if not self._reachable or now - self._asked < 1.0:
            return
        self._asked = now
        if self.answers():
            self._well = now
        elif now - self._well > _HEAD_SECONDS:
            raise HeadLostError(
                f"the Ray head at {self._address[0]}:{self._address[1]} does not answer any more; start the cluster and run the "
                "same command again, which goes on from the newest checkpoint"
            )

    def answers(self) -> bool:
        """Whether the head accepts a connection; True when it never did, because then a connection says nothing."""
        return not self._reachable or _answers(self._address)
