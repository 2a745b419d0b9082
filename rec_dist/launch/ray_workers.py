"""Workers on Ray Train: one attempt after another, each on as many workers as the cluster holds at that time."""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rec_dist.config.schema import ClusterConfig
from rec_dist.errors import StopRequested, UserError, WorkerFailedError
from rec_dist.launch import ray_cluster
from rec_dist.launch.ray_metrics import label
from rec_dist.launch.restart import FINAL, NeverStartedError, NotPlacedError, Paused
from rec_dist.launch.sizing import Elastic, Size
from rec_dist.launch.watchdog import Cluster, Supervisor, Timeouts
from rec_dist.runtime.heartbeat import begin_attempt
from rec_dist.runtime.quiet import quieten
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World
from rec_dist.storage.disk import as_disk_error

WorkerFunction = Callable[[World, Any], dict[str, Any]]
_COLLECTIVE_SECONDS = 1800  # torch's own limit for a collective; cluster.hang_seconds may be longer


class Attempts:
    """The attempts of one launch. Each call is an attempt, on as many workers as the cluster holds at that time.

    timeouts: None for a launch that is neither watched nor stopped nor restarted.
    """

    def __init__(
        self, worker: WorkerFunction, job: Any, cluster: ClusterConfig, run: RunDirectory, timeouts: Timeouts | None, every: int
    ) -> None:
        self._worker, self._job, self._cluster, self._run = worker, job, cluster, run
        self._timeouts, self._every = timeouts, every
        self._elastic = Elastic(cluster)
        self._head = ray_cluster.Head()

    def __call__(self) -> dict[str, Any]:
        """Returns what rank 0 returned. Raises the cause of a failure, or Paused when another attempt should follow."""
        size = self._size()
        begin_attempt(self._run.attempt)
        self._run.log(f"starting {size}")
        trainer = self._trainer(size)
        faults: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as fault:
                faults.append(fault)

        # In a thread, so that Ray leaves the signals alone: its own handler aborts without a checkpoint.
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        watch = self._supervisor(size) if self._timeouts is not None else None
        while thread.is_alive():
            thread.join(0.2)
            self._head.check()
            if watch is not None:
                watch.tick()
                if watch.fault is not None:
                    if not isinstance(watch.fault, NeverStartedError):
                        thread.join(60.0)  # until Ray notices that the workers are dead, and frees their resources
                    raise watch.fault
        if faults:
            raise cause(faults[0])
        result = self._run.take_result()
        if watch is not None and watch.pausing and not result["finished"] and not self._run.stop_wanted(result["step"]):
            raise Paused(result["step"])
        return result

    def _size(self) -> Size:
        """The size of the next attempt. After a failure, waits until lost nodes are back, or for cluster.node_wait_seconds."""
        if self._elastic.wanted is None:
            return self._elastic.first(ray_cluster.nodes(asked=False))
        deadline = time.monotonic() + self._cluster.node_wait_seconds
        while True:
            late = time.monotonic() >= deadline
            try:
                size = self._elastic.largest(ray_cluster.nodes())
                if late or size.num_workers == self._elastic.wanted:
                    return size
            except UserError as fault:
                if late:
                    raise WorkerFailedError(
                        f"after a failure and {self._cluster.node_wait_seconds:g} s (cluster.node_wait_seconds) {fault}, or set "
                        "cluster.min_workers to go on with fewer; then run the same command again"
                    ) from fault
            if self._run.stop_wanted(-1):
                raise StopRequested("stopped while waiting for nodes; run the same command to go on from the newest checkpoint")
            time.sleep(1.0)

    def _supervisor(self, size: Size) -> Supervisor:
        assert self._timeouts is not None

        def fits_without(leaving: Sequence[str]) -> int:
            try:
                return self._elastic.largest(ray_cluster.nodes(leaving)).num_workers
            except UserError:
                return 0

        lacking = size.num_workers < (self._elastic.wanted or 0)
        cluster = Cluster(
            end=lambda beats, stacks: ray_cluster.end(beats, self._run.attempt, stacks),
            # Only while the head answers: a call to a dead head waits, and then ends this process.
            leaving=lambda nodes: sorted(nodes & ray_cluster.draining()) if self._head.answers() else [],
            without=lambda leaving: self._cluster.min_workers is not None and fits_without(leaving) > 0,
            more=lambda: fits_without(()) - size.num_workers if lacking and self._head.answers() else 0,
        )
        return Supervisor(self._run, self._timeouts, cluster, every_steps=self._every)

    def _trainer(self, size: Size) -> Any:
        import ray.train
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        worker, job, run = self._worker, self._job, self._run

        def on_worker(_: Any) -> None:
            quieten()
            context = ray.train.get_context()
            device = f"cuda:{_gpu_index()}" if size.use_gpu else "cpu"
            node = ray.get_runtime_context().get_node_id()
            world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device, node)
            try:
                result = worker(world, job)
            except FINAL:
                raise
            except Exception as fault:  # as text, because Ray passes the exception on without its traceback
                raise as_disk_error(fault) or WorkerFailedError(traceback.format_exc()) from None
            if world.is_main:
                run.write_result(result)

        hang = self._timeouts.hang_seconds if self._timeouts is not None else 0.0
        return TorchTrainer(
            on_worker,
            train_loop_config={},
            torch_config=TorchConfig(
                backend="nccl" if size.use_gpu else "gloo", timeout_s=int(max(_COLLECTIVE_SECONDS, hang + 60))
            ),
            scaling_config=ScalingConfig(
                num_workers=size.num_workers,
                use_gpu=size.use_gpu,
                resources_per_worker={"CPU": size.cpus, **({"GPU": 1} if size.use_gpu else {})},
                placement_strategy="PACK" if size.use_gpu else "SPREAD",  # one worker a node also where nodes are uneven
            ),
            # Ray stores nothing for us. Each attempt has a new name, because Ray resumes a name that it knows. We restart
            # ourselves: Ray would keep the size, would not stop after two failures at one step, and after a preemption or a
            # failed placement would try for ever.
            run_config=RunConfig(
                name=f"{label(run.path.name)}-{time.time_ns()}",
                storage_path=str(run.path / "ray"),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )


def _gpu_index() -> int:
    import ray.train.torch

    index = ray.train.torch.get_device().index
    return int(index) if index is not None else 0


def cause(fault: BaseException) -> BaseException:
    """The first of our own errors inside what Ray raised, which you can act on; otherwise what Ray raised."""
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
        if type(current).__name__ == "WorkerGroupStartupTimeoutError":
            return NotPlacedError(f"the workers found no room in the cluster: {current}".splitlines()[0])
        queue += [current.__cause__, getattr(current, "cause", None), getattr(current, "controller_failure", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return fault
