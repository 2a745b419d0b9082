"""Runs the jobs of `rec-dist prepare` on Ray Data: one row and one task a job, with results in the order of the jobs.

Ray Data holds tasks back while results wait, repeats the tasks of a lost worker or node (which is safe because a job's files are
whole or absent), and runs as many tasks at a time as the cluster has CPUs. Cost: 20-30 s to start Ray here, about 1 s a step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rec_dist.config.schema import ClusterConfig
from rec_dist.data.prepare.jobs import Jobs
from rec_dist.errors import UnreachableError, UserError, WorkerFailedError
from rec_dist.launch.ray_data import ray_data
from rec_dist.runtime.limits import each_within


@dataclass(frozen=True)
class _Whole:
    """A job or a result in a row. Ray Data would take a bare value apart: lists become arrays, tuples lists."""

    value: Any


def ray_jobs(cluster: ClusterConfig) -> Jobs:
    """Joins or starts Ray and returns what runs jobs on it.

    It raises WorkerFailedError when no job ends for cluster.hang_seconds.
    """
    context = ray_data(cluster, ordered=True).DataContext.get_current()
    import ray

    context.enable_fallback_to_arrow_object_ext_type = True  # for _Whole; unset, Ray Data does the same with a warning
    return Jobs(partial(_run, cluster.hang_seconds), sum(node["Alive"] for node in ray.nodes()))


def _run(hang_seconds: float, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    import ray.data

    def on_worker(row: dict[str, Any]) -> dict[str, Any]:
        result: Any
        try:
            result = function(row["job"].value)
        except (UserError, UnreachableError) as fault:  # as a result, because Ray would wrap an exception and try again
            result = fault
        return {"result": _Whole(result)}

    rows = ray.data.from_items([{"job": _Whole(job)} for job in jobs], override_num_blocks=len(jobs))
    try:
        for row in each_within(hang_seconds, iter(rows.map(on_worker, num_cpus=1).iter_rows())):
            result = row["result"].value
            if isinstance(result, UserError | UnreachableError):
                raise result
            yield result
    except TimeoutError as fault:
        raise WorkerFailedError(f"hang: a job of prepare on Ray: {fault}; run the same command again") from fault
