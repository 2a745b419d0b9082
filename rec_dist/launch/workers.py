"""Starts a worker function on Ray Train workers, or here.

A worker function takes (World, job) and returns a dict. It reports its progress through the run directory, so you see the same
with both launchers, and a stop is a file that rank 0 looks for.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rec_dist.config.schema import CheckpointConfig, ClusterConfig
from rec_dist.errors import UserError
from rec_dist.launch import local
from rec_dist.launch.restart import with_restarts
from rec_dist.launch.sizing import has_gpu_here
from rec_dist.launch.watchdog import Timeouts
from rec_dist.runtime.allocator import keep_freed_memory
from rec_dist.runtime.heartbeat import begin_attempt
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World

WorkerFunction = Callable[[World, Any], dict[str, Any]]


def launch(
    worker: WorkerFunction,
    job: Any,
    cluster: ClusterConfig,
    run: RunDirectory,
    *,
    saving: CheckpointConfig | None = None,
    owns_process: bool = True,
) -> dict[str, Any]:
    """Runs `worker` on every worker of `cluster` and returns what rank 0 returned.

    saving: for a worker that trains. SIGINT and SIGTERM then ask it to save and stop, a hang is a failure, and a failure of a Ray
    worker is followed by another attempt, up to cluster.max_restarts; otherwise they end it.
    owns_process: whether this process is a command's own, so that a local worker may set its allocator, and end it when it hangs.
    Raises UserError when the cluster cannot hold the workers or a worker met one, WorkerFailedError when a Ray worker failed.
    """
    if cluster.num_workers != "auto" and cluster.num_workers < 1:
        raise UserError(f"cluster.num_workers ({cluster.num_workers}) must be 1 or more, or auto")
    if cluster.min_workers is not None and cluster.num_workers != "auto" and cluster.min_workers > cluster.num_workers:
        raise UserError(f"cluster.min_workers ({cluster.min_workers}) is more than cluster.num_workers ({cluster.num_workers})")
    signals = stop_on_signal(run) if saving is not None else nullcontext()
    timeouts = Timeouts(cluster.hang_seconds, saving.grace_seconds) if saving is not None else None
    every = saving.every_steps if saving is not None else 1
    if cluster.launcher == "local":
        device = local_device(cluster)
        begin_attempt(run.attempt)
        watch = local.supervisor(run, timeouts, every) if timeouts is not None else None
        work = lambda: worker(World(device=device), job)
        with signals:
            if not owns_process:
                return local.work_in_thread(work, watch, run)
            if device == "cpu":
                keep_freed_memory()
            return local.work_here(work, watch)
    from rec_dist.launch import ray_cluster, ray_workers

    ray_cluster.connect(cluster.address)
    with signals:  # only now: ray.init() has put its own handlers in the place of any that stood before
        attempts = ray_workers.Attempts(worker, job, cluster, run, timeouts, every)
        return with_restarts(attempts, run, limit=cluster.max_restarts if saving is not None else 0)


def local_device(cluster: ClusterConfig) -> str:
    """What the one worker of cluster.launcher=local runs on.

    Raises UserError when more workers are asked for, or a GPU that is not there.
    """
    import torch

    if cluster.num_workers not in ("auto", 1):
        raise UserError(
            f"cluster.num_workers ({cluster.num_workers}) needs cluster.launcher=ray; the local launcher has one worker"
        )
    if cluster.use_gpu is True and not torch.cuda.is_available():
        raise UserError("cluster.use_gpu is true but this machine has no GPU that torch sees; set cluster.use_gpu=false")
    return "cuda:0" if has_gpu_here(cluster) else "cpu"


@contextmanager
def stop_on_signal(run: RunDirectory) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM asks the run to save and stop; a second SIGINT ends it at once.

    Only the main thread of a process gets signals: in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    interrupts = 0

    def handle(number: int, _: Any) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        run.request_stop()
        run.log(f"{signal.Signals(number).name}: saving a checkpoint after this step, then stopping")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
