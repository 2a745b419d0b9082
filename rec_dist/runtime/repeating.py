"""A call that a thread repeats while other work goes on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(tick: Callable[[], None], seconds: float, *, name: str) -> Iterator[None]:
    """Inside, a daemon thread `name` calls `tick` every `seconds`. It has ended when the block is left."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            tick()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
