"""Ray Data as commands use it: quiet, and with or without an order."""

import logging
from typing import Any

from rec_dist.config.schema import ClusterConfig
from rec_dist.launch.ray_cluster import connect


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
