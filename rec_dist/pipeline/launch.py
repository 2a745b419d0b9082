"""Starts a worker function on Ray Train workers, or here. This file and prepare_on_ray.py alone import ray.

A worker function takes (World, job) and returns a dict. It tells of its progress through the run directory, so what a person
sees is the same for both launchers, and a stop is a file that rank 0 looks for.
"""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rec_dist.config.schema import ClusterConfig
from rec_dist.pipeline.restart import FINAL, with_restarts
from rec_dist.runtime.disk import as_disk_error
from rec_dist.runtime.errors import UserError, WorkerFailedError
from rec_dist.runtime.quiet import quieten
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World

WorkerFunction = Callable[[World, Any], dict[str, Any]]


def launch(
    worker: WorkerFunction, job: Any, cluster: ClusterConfig, run: RunDirectory, *, stoppable: bool = False
) -> dict[str, Any]:
    """Runs `worker` on every worker of `cluster` and returns what rank 0 returned.

    stoppable: SIGINT and SIGTERM ask the run to save and stop, and a failure of a Ray worker is followed by another attempt, up to
    cluster.max_restarts; otherwise they end it.
    Raises UserError when the cluster cannot hold the workers or a worker met one, WorkerFailedError when a Ray worker failed.
    """
    if cluster.num_workers != "auto" and cluster.num_workers < 1:
        raise UserError(f"cluster.num_workers ({cluster.num_workers}) must be 1 or more, or auto")
    signals = stop_on_signal(run) if stoppable else nullcontext()
    if cluster.launcher == "local":
        with signals:
            return _local(worker, job, cluster)
    connect(cluster.address)
    with signals:  # only now: ray.init() has put its own handlers in the place of any that stood before
        return with_restarts(lambda: _on_ray(worker, job, cluster, run), run, limit=cluster.max_restarts if stoppable else 0)


def _local(worker: WorkerFunction, job: Any, cluster: ClusterConfig) -> dict[str, Any]:
    import torch

    if cluster.num_workers not in ("auto", 1):
        raise UserError(
            f"cluster.num_workers ({cluster.num_workers}) needs cluster.launcher=ray; the local launcher has one worker"
        )
    if cluster.use_gpu is True and not torch.cuda.is_available():
        raise UserError("cluster.use_gpu is true but this machine has no GPU that torch sees; set cluster.use_gpu=false")
    on_gpu = torch.cuda.is_available() if cluster.use_gpu == "auto" else cluster.use_gpu
    return worker(World(device="cuda:0" if on_gpu else "cpu"), job)


def _on_ray(worker: WorkerFunction, job: Any, cluster: ClusterConfig, run: RunDirectory) -> dict[str, Any]:
    """One attempt, on as many workers as the cluster holds now."""
    import ray
    import ray.train
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    num_workers, use_gpu, cpus = size_workers(cluster, [node["Resources"] for node in ray.nodes() if node["Alive"]])

    def on_worker(_: Any) -> None:
        quieten()
        context = ray.train.get_context()
        device = f"cuda:{_gpu_index()}" if use_gpu else "cpu"
        world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device)
        try:
            result = worker(world, job)
        except FINAL:
            raise
        except Exception as fault:  # as text: Ray hands the exception on without its traceback
            raise as_disk_error(fault) or WorkerFailedError(traceback.format_exc()) from None
        if world.is_main:
            run.write_result(result)

    trainer = TorchTrainer(
        on_worker,
        train_loop_config={},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        # Ray keeps nothing of ours; a new name for each attempt, since a name with history would be resumed.
        run_config=RunConfig(name=f"{run.path.name}-{time.time_ns()}", storage_path=str(run.path / "ray")),
    )
    run.log(f"starting {num_workers} worker{'s' if num_workers > 1 else ''} with {'1 GPU' if use_gpu else f'{cpus:g} CPU'} each")
    faults: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as fault:
            faults.append(fault)

    # In a thread, so that Ray leaves the signals to us: its own handler aborts without a checkpoint.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if faults:
        raise _cause(faults[0])
    return run.take_result()


def connect(address: str | None) -> None:
    """Joins the cluster at `address` (or RAY_ADDRESS), or starts one on this machine. Raises UserError when none answers."""
    import ray

    if ray.is_initialized():
        return
    # Workers tell through the run directory; Ray's repetition of their output would say it twice.
    try:
        ray.init(
            address=address or os.environ.get("RAY_ADDRESS"),
            include_dashboard=None if address or "RAY_ADDRESS" in os.environ else False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
        )
    except (ConnectionError, ValueError) as fault:
        raise UserError(
            f"cluster.address ({address or os.environ.get('RAY_ADDRESS')}): no Ray cluster answers ({fault}); start one, or unset it "
            "to use this machine"
        ) from fault


def size_workers(cluster: ClusterConfig, nodes: list[dict[str, float]]) -> tuple[int, bool, float]:
    """(workers, GPUs or not, CPUs a worker) for nodes with these resources; a worker must fit on one node.

    Raises UserError when the nodes hold fewer than asked for: Ray would wait for more without a word.
    """
    cpus, gpus = [node.get("CPU", 0.0) for node in nodes], [int(node.get("GPU", 0)) for node in nodes]
    use_gpu = bool(sum(gpus) > 0 if cluster.use_gpu == "auto" else cluster.use_gpu)
    if use_gpu and not sum(gpus):
        raise UserError("cluster.use_gpu is true but the cluster has no GPU; set cluster.use_gpu=false or auto")
    automatic = sum(gpus) if use_gpu else min(2, max(int(sum(cpus)), 1))
    num_workers = automatic if cluster.num_workers == "auto" else cluster.num_workers
    if use_gpu and num_workers > sum(gpus):
        raise UserError(f"cluster.num_workers ({num_workers}) is more than the cluster's {sum(gpus)} GPUs; lower it or add nodes")

    def room(share: float) -> int:
        """Workers that fit with `share` CPUs each."""
        return sum(min(int(cpu // share), gpu if use_gpu else num_workers) for cpu, gpu in zip(cpus, gpus, strict=True))

    shares = [float(share) for share in range(int(max(cpus, default=0.0)), 0, -1)] + ([0.5] if use_gpu else [])
    if cluster.cpus_per_worker != "auto":
        shares = [cluster.cpus_per_worker] if cluster.cpus_per_worker > 0 else []
    share = next((share for share in shares if room(share) >= num_workers), None)
    if share is None:
        raise UserError(
            f"cluster.num_workers ({num_workers}) with cluster.cpus_per_worker ({cluster.cpus_per_worker}) needs more CPUs than the "
            f"cluster's {len(nodes)} node(s) have ({sum(cpus):g} in all); lower one of them or add nodes"
        )
    return num_workers, use_gpu, share


def _gpu_index() -> int:
    import ray.train.torch

    index = ray.train.torch.get_device().index
    return int(index) if index is not None else 0


def _cause(fault: BaseException) -> BaseException:
    """What a user can act on (one of our errors) inside what Ray raised, if there is such; else what Ray raised."""
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [fault]
    while queue:
        current = queue.pop()
        if current is None or any(current is known for known in seen):
            continue
        seen.append(current)
        for kind in FINAL:
            if isinstance(current, kind):
                return kind(str(current).splitlines()[0])
        queue += [current.__cause__, getattr(current, "cause", None), getattr(current, "controller_failure", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return fault


@contextmanager
def stop_on_signal(run: RunDirectory) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM asks the run to save and stop; a second SIGINT ends it at once."""
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
