"""Ctrl-C, noted: a library that is interrupted during its import may raise something else than KeyboardInterrupt.

A second one ends the process at once: whatever is being cleaned up, in our code or in a library's, is left as a kill would leave
it, which the next command can take.
"""

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

INTERRUPTED = "interrupted; what was saved before is kept"
_EXIT_FAILED = 1


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Inside, SIGINT raises KeyboardInterrupt, and its number is put on the list that is given. A second one ends the process."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        yield noted
        return

    def handle(number: int, _: object) -> None:
        noted.append(number)
        if len(noted) > 1:
            end_at_once()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield noted
    finally:
        if not noted:  # else a second one may still come while the process ends
            signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_once() -> NoReturn:
    """Ends the process without any cleaning up."""
    os.write(2, f"{INTERRUPTED}\n".encode())  # print() may be in the middle of another line
    os._exit(_EXIT_FAILED)


def _ignore_at_the_end() -> None:
    """From here on Python takes itself apart, and a handler would no longer run: a second Ctrl-C changes no exit code."""
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


atexit.register(_ignore_at_the_end)  # at import, before Ray registers how it ends, so that this runs after it
