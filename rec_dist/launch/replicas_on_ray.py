"""Replicas of Ray Serve, which starts them again when they are lost: scorers of a server that is this process (RayReplicas), or
whole servers behind Ray Serve's own proxies (http_application).

Each model of RayReplicas is an application of its own, so that a new one starts beside the old one. Its replicas reserve half of
their share of the CPUs, to leave room for it, and compute with all of the share. A GPU is reserved whole.
Cost: 20-30 s to start Ray here; a second or so to notice a lost replica, and its start and the loading of the model to replace it.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from rec_dist.config.schema import ClusterConfig
from rec_dist.errors import UserError, WorkerFailedError
from rec_dist.launch import ray_cluster
from rec_dist.launch.sizing import size_workers
from rec_dist.runtime.limits import within
from rec_dist.runtime.messages import messages_to, visible
from rec_dist.runtime.quiet import quieten
from rec_dist.serving.engine import Engine, Outcomes, Query
from rec_dist.serving.guard import App

Load = Callable[[str], Engine]  # the device -> a loaded scorer

logger = logging.getLogger(__name__)
_RETRY_SECONDS = 0.2


class _Replica:
    """A process with the model. What the user did wrong comes back as a result, since Ray Serve would try again for ever."""

    def __init__(self, load: Load, device: str) -> None:
        quieten()
        self._load, self._device = load, device
        self._engine: Engine | None = None
        self._fault = self._loaded()

    def _loaded(self) -> str:
        """Loads the model. Returns what is wrong with it, empty for nothing."""
        try:
            self._engine = self._load(self._device)
        except UserError as fault:
            return str(fault)
        return ""

    def fault(self) -> str:
        return self._fault

    def answer(self, queries: list[Query]) -> Outcomes:
        if self._engine is None:  # a lost replica was started again while its files could not be read
            self._fault = self._loaded()
        if self._engine is None:
            raise RuntimeError(self._fault)
        return self._engine.answer(queries)


class _Server:
    """A process with the model that answers HTTP. Its messages go to the log that Ray Serve keeps of a replica."""

    def __init__(self, build: Callable[[], App]) -> None:
        quieten()
        self._build, self._open = build, ExitStack()
        self._open.enter_context(messages_to(lambda line: logging.getLogger("ray.serve").info(visible(line))))

    def __serve_build_asgi_app__(self) -> App:
        """Called by Ray Serve, in the event loop that then answers."""
        return self._build()


def http_application(build: Callable[[], App], *, queue: int, drain_seconds: float) -> Any:
    """An application of Ray Serve with the deployment `server`, each of whose replicas is what `build` makes there.

    queue: requests that a replica keeps waiting; it turns others away itself, so Ray Serve hands it more than these.
    """
    from ray import serve

    body, most = serve.ingress()(_Server), 2 * queue
    server = _deployment(body, "server", drain_seconds, log_level="INFO", max_ongoing_requests=most, max_queued_requests=most)
    return server.bind(build)


def _deployment(replica: Any, name: str, drain_seconds: float, *, log_level: str = "WARNING", **options: Any) -> Any:
    """drain_seconds: how long a replica that is to end may take for what it has begun."""
    from ray import serve

    return serve.deployment(
        replica,
        name=name,
        health_check_period_s=1.0,
        health_check_timeout_s=60.0,
        graceful_shutdown_timeout_s=drain_seconds,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config={"enable_access_log": False, "log_level": log_level},
        **options,
    )


class RayReplicas:
    """Implements Replicas. A batch whose replica is lost goes to another one, until the deadline of its requests has passed.

    lost: called for each such batch.
    """

    def __init__(self, load: Load, cluster: ClusterConfig, *, deadline_seconds: float, lost: Callable[[], None]) -> None:
        """Starts the replicas and waits until they have loaded the model.

        Raises UserError if the cluster is too small or a replica refuses the model, and WorkerFailedError if they have not loaded
        it within cluster.hang_seconds.
        """
        try:
            from ray import serve
        except ImportError as fault:
            raise UserError(
                f"cluster.launcher=ray serves with Ray Serve, which lacks a package here ({fault}); pip install 'rec-dist[serve]', "
                "or set cluster.launcher=local"
            ) from fault
        ray_cluster.connect(cluster.address)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        size = size_workers(cluster, ray_cluster.nodes(asked=False))
        self.count = size.num_workers
        self._deadline_seconds, self._lost = deadline_seconds, lost
        self._name = f"rec-dist-{secrets.token_hex(8)}"  # a process id is another server's, too: in containers all are process 1
        threads = str(max(1, int(size.cpus)))
        actor = {
            "num_cpus": size.cpus / 2,
            "num_gpus": int(size.use_gpu),
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}},
        }
        serve.start(proxy_location="Disabled")
        deployment = _deployment(
            _Replica, "scorer", deadline_seconds, num_replicas=self.count, max_ongoing_requests=1, ray_actor_options=actor
        )
        device = "cuda:0" if size.use_gpu else "cpu"
        logger.info(f"starting {size}")

        def start() -> tuple[Any, list[str]]:
            handle = serve.run(deployment.bind(load, device), name=self._name, route_prefix=None)
            return handle, [fault for fault in handle.broadcast("fault").results() if fault]

        try:
            self._handle, refusals = within(cluster.hang_seconds, start)
            if refusals:
                of_some = "" if len(refusals) == self.count else f" (on {len(refusals)} of {self.count} replicas)"
                raise UserError(f"{refusals[0]}{of_some}")
        except BaseException as fault:  # also Ctrl-C: replicas outlive this process on a cluster that it has joined
            why = self._why_not() if isinstance(fault, RuntimeError) else ""  # of Ray Serve, which does not say it
            with suppress(Exception):
                self.close()
            if isinstance(fault, TimeoutError):
                raise WorkerFailedError(f"hang: the replicas have not loaded the model: {fault}") from fault
            if why:
                raise WorkerFailedError(f"the replicas could not load the model: {why}") from fault
            raise

    def _why_not(self) -> str:
        """The last line that a replica left which could not start; empty without any."""
        from ray import serve

        application = serve.status().applications.get(self._name)
        told = "" if application is None else "\n".join(one.message for one in application.deployments.values())
        return next((line for line in reversed(told.splitlines()) if line.strip()), "")

    async def answer(self, queries: list[Query]) -> Outcomes:
        """As Replicas.answer."""
        from ray.exceptions import RayActorError

        deadline = time.monotonic() + self._deadline_seconds
        while True:
            try:
                outcomes: Outcomes = await self._handle.answer.remote(queries)
                return outcomes
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                self._lost()
                await asyncio.sleep(_RETRY_SECONDS)

    def close(self) -> None:
        """As Replicas.close."""
        from ray import serve

        serve.delete(self._name)
