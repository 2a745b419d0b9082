"""A limit for a call that may never return: a library that waits for a server, a cluster, a file system that is gone.

No exception can end such a call. It runs in a thread of its own, which is left behind when the limit is over.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises. seconds: cluster.hang_seconds, 0 for no limit. Raises TimeoutError, which names the key."""
    if seconds == 0:
        return call()
    results: list[T] = []
    faults: list[BaseException] = []

    def target() -> None:
        try:
            results.append(call())
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=target, name="limited", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s (cluster.hang_seconds)")
    if faults:
        raise faults[0]
    return results[0]


def each_within(seconds: float, values: Iterator[T]) -> Iterator[T]:
    """The values of an iterator, each of which may take `seconds`. Raises TimeoutError as `within` does."""
    while (value := within(seconds, lambda: next(values, _END))) is not _END:
        yield value
