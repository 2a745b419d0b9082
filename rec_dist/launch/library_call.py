"""What surrounds the work of a call of the Python API, so that it leaves the process as it was."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rec_dist.launch.ray_cluster import disconnected
from rec_dist.runtime.process_state import restored
from rec_dist.runtime.quiet import quieten_call
from rec_dist.storage.disk import as_disk_error

_ONE_AT_A_TIME = threading.RLock()  # a process has one process group


@contextmanager
def library_call() -> Iterator[None]:
    """Around the work of a call: what it changes in the process is restored, and a fault of the disk is raised as DiskError."""
    with _ONE_AT_A_TIME, restored(), disconnected():
        quieten_call()
        try:
            yield
        except Exception as fault:
            disk = as_disk_error(fault)
            if disk is None or disk is fault:
                raise
            raise disk from fault
