"""The package's messages as lines of text: what the command line writes to standard error.

Messages go through `logging`, under the name of the module that has something to say. In Python you decide what is shown, for
example with logging.basicConfig(level=logging.INFO).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WARNING = "WARNING: "  # begins a line that is a warning, here and in a run's log


class _Lines(logging.Handler):
    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(f"{WARNING if record.levelno == logging.WARNING else ''}{record.getMessage()}")


@contextmanager
def messages_to(write: Callable[[str], None]) -> Iterator[None]:
    """Inside, `write` gets every message of the package as one line, and no other handler does."""
    logger, handler = logging.getLogger("rec_dist"), _Lines(write)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
