"""glibc's allocator keeps what training frees. By default it gives large blocks back to the system at once.

Every pass allocates the same large tensors again (logits, gathered weights), and each page that the system hands out anew costs
a page fault: 0.5 s of a ZeRO-3 step of 3 s, four fifths of a pass of SASRec over 3,706 items (docs/LOG.md). The price is freed
memory that is not used again. Training has little of it. The setting cannot be undone, so only workers and the command line
make it.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt(3)
_LARGEST_INT = 2**31 - 1

SETTINGS = {"MALLOC_MMAP_MAX_": 0, "MALLOC_TRIM_THRESHOLD_": 64 << 30, "MALLOC_TOP_PAD_": 64 << 20}
"""What glibc reads from the environment when a process starts. All but the first are bytes."""


def keep_freed_memory() -> bool:
    """Makes the setting in this process, which has started already, for good.

    Returns False without glibc, and when you have set one of the variables to another value.
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) not in (None, str(SETTINGS[name])) for name in SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    chosen = {_MMAP_MAX: "MALLOC_MMAP_MAX_", _TRIM_THRESHOLD: "MALLOC_TRIM_THRESHOLD_", _TOP_PAD: "MALLOC_TOP_PAD_"}
    return all(mallopt(parameter, min(SETTINGS[name], _LARGEST_INT)) == 1 for parameter, name in chosen.items())
