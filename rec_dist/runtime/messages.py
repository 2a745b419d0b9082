"""The package's messages as lines of text: what the command line writes, and how text of others is made harmless in it.

Titles, ids, headers and paths come from files of others. A terminal obeys control characters in them: they hide a line, or
write another one. So everything that the command line prints goes through say(), and a run's log through visible().
Messages go through `logging`, under the name of the module that has something to say. In Python you decide what is shown, for
example with logging.basicConfig(level=logging.INFO).
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

WARNING = "WARNING: "  # begins a line that is a warning, here and in a run's log

# C0 and C1 controls and DEL without tab and line feed; marks and overrides of the writing direction; line and paragraph
# separators; half characters, which no stream can encode.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text for a terminal: characters that it would obey are written as Python writes them, such as \\x1b, \\r and \\u202e."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def visible_json(text: str) -> str:
    """JSON for a terminal or a file: the characters of visible() in their JSON form, such as \\u202e, so it reads back the same."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints text, made visible, and a line feed to `file` (standard output), at once."""
    print(visible(text), file=file, flush=True)


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
