"""glibc's allocator keeps what training frees. By default it gives large blocks back to the system at once.

Every pass allocates the same large tensors again (logits, gathered weights), and each page that the system hands out anew costs
a page fault: 0.5 s of a ZeRO-3 step of 3 s, four fifths of a pass of SASRec over 3,706 items (docs/LOG.md). The price is freed
memory that is not used again: micro-batches of many lengths leave holes that the next ones do not fit into. `Holes` gives them
back once they are a fifth of what the process holds (benchmarks/memory_growth.py). The setting cannot be undone, so only workers
and the command line make it.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt(3)
_LARGEST_INT = 2**31 - 1
_MOST_HELD = 1.25  # times what is needed

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


class Holes:
    """Gives kept memory back when the process holds 1.25 times what it was seen to need.

    Needed is what it holds after the first work behind a return: that has touched what it uses, and nothing else is kept. Cost: a
    return, and page faults of the next work, 0.1 to 0.3 s a GB; work that needs more than any before it counts as holes once.
    """

    def __init__(self) -> None:
        self._needed = 0
        self._returned = True

    def after_work(self, resident: int) -> bool:
        """Call between two pieces of work, such as micro-batches. resident: bytes. Returns whether memory was given back."""
        if self._returned:
            self._needed, self._returned = max(self._needed, resident), False
        elif resident > _MOST_HELD * self._needed:
            self._returned = _trim()
        return self._returned


def _trim() -> bool:
    """Gives the free pages of all arenas back, also between blocks in use. Returns False without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
    return trim is not None
