"""Ray Data as commands use it: quiet, with or without an order, and with faults that keep their type and message.

Ray Data wraps what a worker raises in an exception of its own, with a traceback in its message. So a worker returns what a
command shows in one line, as a row, and the driver raises it.
"""

import logging
from typing import Any

from rec_dist.config.schema import ClusterConfig
from rec_dist.errors import DiskError, NotFiniteError, UnreachableError, UserError
from rec_dist.launch.ray_cluster import connect

SHOWN = (UserError, UnreachableError, NotFiniteError, DiskError)


def fault_columns(fault: BaseException | None) -> dict[str, str]:
    """The columns of a row that tell which of SHOWN was raised; None: nothing."""
    kinds = [kind.__name__ for kind in SHOWN if isinstance(fault, kind)]
    return {"kind": kinds[0] if kinds else "", "fault": str(fault) if kinds else ""}


def raise_fault(row: dict[str, Any]) -> None:
    """Raises what the columns tell, if anything."""
    for kind in SHOWN:
        if row["kind"] == kind.__name__:
            raise kind(row["fault"])


def ray_data(cluster: ClusterConfig, *, ordered: bool) -> Any:
    """Joins or starts Ray, and returns the module ray.data. ordered: whether results wait for those of earlier inputs."""
    connect(cluster.address)
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # a line a step, which commands log already; Ray's own log file keeps it
            handler.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # commands show their own
    context.print_on_execution_start = False
    context.execution_options.preserve_order = ordered
    return ray.data
