"""`rec-dist serve`: a finished run, a base model or popularity behind HTTP, until SIGTERM or Ctrl-C.

The server is this process. Its scorers are replicas of Ray Serve (cluster.launcher=ray), or one thread of this process (local).
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rec_dist.commands.interrupts import end_at_once
from rec_dist.commands.rank_request import MAX_CATALOGUE
from rec_dist.commands.ranked_model import ranked_model, scorer_of
from rec_dist.config.overrides import Overrides
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.errors import UserError
from rec_dist.launch.ray_cluster import disconnected
from rec_dist.launch.replicas_on_ray import RayReplicas
from rec_dist.launch.workers import local_device
from rec_dist.serving.app import build_app
from rec_dist.serving.batcher import Limits, Replicas
from rec_dist.serving.engine import Engine
from rec_dist.serving.guard import Access, Guard, is_local
from rec_dist.serving.in_process import InProcess
from rec_dist.serving.metrics import Metrics
from rec_dist.serving.served import Loaded
from rec_dist.serving.server import Server, bound
from rec_dist.serving.switch import Switch, stamp
from rec_dist.storage.files import fingerprint

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "REC_DIST_SERVE_TOKEN"
_LEAST_TOKEN = 16  # characters
_PROMPT_CACHE_MIB = 1024  # some 150 prompts of 150 tokens of SmolLM2-135M in float32
_DRAIN_SECONDS = 5.0  # beyond the deadline of a request


@dataclass(frozen=True)
class ServeOptions:
    """Where the server listens, and what it takes. token_file: holds the token that callers must send.

    prompt_cache_mib: of each scorer, for keys and values of language models' prompts; None: 1024 on CPUs, 0 on GPUs.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 256
    deadline_seconds: float = 30.0
    token_file: Path | None = None
    prompt_cache_mib: int | None = None

    @property
    def drain_seconds(self) -> float:
        """How long the end of the server waits for answers to requests that have begun."""
        return self.deadline_seconds + _DRAIN_SECONDS

    def prompt_bytes(self, device: str) -> int:
        """Bytes of prompts that a scorer on `device` keeps."""
        default = _PROMPT_CACHE_MIB if device == "cpu" else 0
        return (default if self.prompt_cache_mib is None else self.prompt_cache_mib) << 20


def serve(target: Path, overrides: Overrides, options: ServeOptions) -> int:
    """Serves until a signal, then answers what has been accepted. Returns the exit code.

    target: a finished run directory, or a configuration for its base model (evaluate.ranker=popularity: for that order).
    Raises UserError, before a model is loaded, for an option that cannot be used and for a run that is not finished.
    """
    with running(target, overrides, options) as server, _signals() as stop:
        shown = f"[{options.host}]" if ":" in options.host else options.host
        logger.info(f"serving {target} at http://{shown}:{server.port}/ (Ctrl-C ends it)")
        while not stop.wait(0.5):
            if not server.alive:
                raise RuntimeError("the server ended by itself")
        logger.info("stopping: requests that have begun are answered first")
        server.stop()
    return 0


@contextmanager
def running(target: Path, overrides: Overrides, options: ServeOptions) -> Iterator[Server]:
    """Inside, the server answers. Arguments and errors as in serve()."""
    token = read_token(options.token_file)
    _check(options)
    with closing(bound(options.host, options.port)) as at, disconnected():
        app = loaded_app(target, overrides, options, Access(token, only_local=is_local(at.getsockname()[0])))
        server = Server(app, at, drain_seconds=options.drain_seconds)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def loaded_app(target: Path, overrides: Overrides, options: ServeOptions, access: Access) -> Guard:
    """The ASGI application with the model that `target` holds, and with those that it holds later."""
    if access.token is None and not access.only_local:
        logger.warning(f"anybody who reaches this server may ask, also for users' lists; set {TOKEN_VARIABLE}")
    metrics, limits = Metrics(), Limits(options.queue, options.deadline_seconds)
    seen = stamp(target)  # None where there is nothing to watch
    load = partial(_load, target, overrides, options, metrics.retries.inc)
    switch = Switch(load(), load, limits, metrics, run=None if seen is None else target, seen=seen)
    return build_app(switch, access, metrics)


def read_token(path: Path | None) -> str | None:
    """The token from the file, or from the environment. Raises UserError for one that is no good."""
    text, place = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    if path is not None:
        place = f"--token-file ({path})"
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"{place} cannot be read: {fault}; give a text file with the token alone") from None
    if text is None:
        return None
    if len(text) < _LEAST_TOKEN or not all("!" <= sign <= "~" for sign in text):
        raise UserError(
            f"the token in {place} must have {_LEAST_TOKEN} or more visible ASCII characters without blanks; make one with "
            "`openssl rand -hex 32`"
        )
    return text


def _check(options: ServeOptions) -> None:
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port ({options.port}) must be from 0 (any that is free) to 65535")
    if options.queue < 1:
        raise UserError(f"--queue ({options.queue}) must be 1 or more requests")
    if options.prompt_cache_mib is not None and options.prompt_cache_mib < 0:
        raise UserError(f"--prompt-cache-mib ({options.prompt_cache_mib}) must be 0 (keep no prompts) or more")
    if not 0.01 <= options.deadline_seconds <= 3600:
        raise UserError(f"--deadline ({options.deadline_seconds:g}) must be from 0.01 to 3600 seconds")


def _load(target: Path, overrides: Overrides, options: ServeOptions, lost: Callable[[], None]) -> Loaded:
    """Loads the model that `target` holds now. lost: called when a replica is lost with a batch."""
    # Resolved, so that a replica which is started again finds its own model after a link has been changed.
    model = ranked_model(target.resolve() if target.is_dir() else target, overrides)
    config = model.config
    if config.cluster.launcher == "local":
        device = local_device(config.cluster.model_copy(update={"num_workers": "auto"}))
        replicas: Replicas = InProcess(Engine(model.data, model.scorer(), prompt_bytes=options.prompt_bytes(device)))
    else:
        load = partial(_engine, config.model_dump(), model.saved, model.identity["model"], options)
        replicas = RayReplicas(load, config.cluster, deadline_seconds=options.deadline_seconds, lost=lost)
    about = {
        "name": target.name,
        "model": fingerprint(model.identity)[:12],
        "method": {"kind": config.task.kind, "ranker": config.evaluate.ranker},
        "members": model.members,
        "scorers": replicas.count,
    }
    return Loaded(model.data, replicas, about, model.slow, MAX_CATALOGUE if model.slow else None)


def _engine(config: dict[str, Any], saved: Path | None, wanted: Any, options: ServeOptions, device: str) -> Engine:
    """In a replica: the model that the driver has checked."""
    settled = RunConfig.model_validate(config)
    data = open_data(settled.data)
    return Engine(data, scorer_of(settled, data, saved, device, wanted), prompt_bytes=options.prompt_bytes(device))


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Inside, SIGTERM or the first SIGINT sets the event; a second SIGINT ends the process at once."""
    stop, interrupts = threading.Event(), 0

    def handle(number: int, _: Any) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            end_at_once()
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
