"""Runs the jobs of `rec-dist prepare` on Ray Data: one row and one task a job, with results in the order of the jobs.

Ray Data holds tasks back while results wait, repeats the tasks of a lost worker or node (which is safe because a job's files are
whole or absent), and runs as many tasks at a time as the cluster has CPUs. Cost: 20-30 s to start Ray here, about 1 s a step.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from rec_dist.config.schema import ClusterConfig
from rec_dist.data.prepare.jobs import Jobs
from rec_dist.errors import DiskError, WorkerFailedError
from rec_dist.launch.ray_cluster import address_of
from rec_dist.launch.ray_data import SHOWN, ray_data
from rec_dist.runtime.limits import each_within
from rec_dist.storage.disk import as_disk_error


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
    # A cluster that this command has not started may grow while it runs, by an autoscaler.
    is_own = address_of(cluster.address) is None
    return Jobs(partial(_run, cluster.hang_seconds), one_machine=is_own and sum(node["Alive"] for node in ray.nodes()) == 1)


def result_of(function: Callable[[Any], Any], job: Any) -> Any:
    """What a job returns, or the fault that a command shows in one line. Ray would wrap an exception in one of its own."""
    try:
        return function(job)
    except Exception as fault:
        if isinstance(fault, SHOWN):
            return fault
        disk = as_disk_error(fault)
        if disk is None:
            raise
        return DiskError(f"the machine {socket.gethostname()}: {disk}")


def _run(hang_seconds: float, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    if not jobs:  # a source without a row; Ray Data takes no dataset without a block
        return
    import ray.data

    def on_worker(row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "result": _Whole(result_of(function, row["job"].value))}

    numbered = [{"number": number, "job": _Whole(job)} for number, job in enumerate(jobs)]
    rows = ray.data.from_items(numbered, override_num_blocks=len(jobs))
    expected = 0
    results = iter(rows.map(on_worker, num_cpus=1).iter_rows())
    try:
        for row in each_within(hang_seconds, results):
            result = row["result"].value
            if isinstance(result, SHOWN):
                raise result
            assert row["number"] == expected, f"job {row['number']} came in the place of job {expected}"
            expected += 1
            yield result
    except TimeoutError as fault:
        raise WorkerFailedError(f"hang: a job of prepare on Ray: {fault}; run the same command again") from fault
    finally:
        with suppress(ValueError):  # a call that hangs is still inside
            results.close()  # ends the jobs that are left, before the caller removes their files
    assert expected == len(jobs), f"{len(jobs) - expected} jobs are missing"
