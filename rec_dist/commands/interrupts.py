"""Ctrl-C, noted: a library that is interrupted during its import may raise something else than KeyboardInterrupt."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Inside, SIGINT raises KeyboardInterrupt, and its number is put on the list that is given."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        yield noted
        return

    def handle(number: int, _: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
