"""The command line: arguments in, exit codes out.

0 done; 1 failed, or audit found a fault; 2 a mistake of the user, in one line; 75 stopped, run it again.
"""

import errno
import io
import logging
import os
import select
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from rec_dist import __version__
from rec_dist.commands.arguments import parse
from rec_dist.commands.dispatch import dispatch
from rec_dist.commands.interrupts import INTERRUPTED, interrupts
from rec_dist.errors import (
    NotFiniteError,
    OutOfMemoryError,
    StopRequested,
    UnreachableError,
    UserError,
    WorkerFailedError,
)
from rec_dist.runtime.environment import untested
from rec_dist.runtime.messages import messages_to, say, visible
from rec_dist.runtime.quiet import quieten, uncollected
from rec_dist.storage.disk import as_disk_error

logger = logging.getLogger(__name__)

EXIT_FAILED, EXIT_USER, EXIT_STOPPED = 1, 2, 75
_USE_LIBRARIES = ("prepare", "train", "distil", "evaluate", "rank", "serve", "profile", "embed", "export", "audit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # JSON lines and tables are UTF-8 in every locale
    with interrupts() as noted:
        try:
            try:
                return _main(arguments)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            return EXIT_FAILED
        except (KeyboardInterrupt, Exception) as fault:
            if not noted and not isinstance(fault, KeyboardInterrupt):
                raise
            _to_stderr(INTERRUPTED)
            return EXIT_FAILED


def _reader_is_gone() -> bool:
    """Whether nobody reads our output any more, as after `rec-dist plan ... | head`. Then the rest of it is dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
    return gone


def _main(arguments: Sequence[str] | None) -> int:
    try:
        parsed = parse(arguments, __version__)
        with uncollected() if parsed.command == "plan" else nullcontext(), messages_to(_to_stderr):
            quieten()
            if parsed.command in _USE_LIBRARIES and (line := untested()) is not None:
                logger.warning(line)
            return dispatch(parsed)
    except UserError as fault:
        _to_stderr(f"error: {' '.join(visible(str(fault)).split())}")
        return EXIT_USER
    except StopRequested as request:
        _to_stderr(str(request))
        return EXIT_STOPPED
    except (OutOfMemoryError, NotFiniteError, UnreachableError, WorkerFailedError) as fault:
        _to_stderr(f"failed: {fault}")
        return EXIT_FAILED
    except Exception as fault:
        if isinstance(fault, OSError) and fault.errno == errno.ENAMETOOLONG:
            _to_stderr(f"error: the path {str(fault.filename)[:200]}... is too long; give a shorter one")
            return EXIT_USER
        if isinstance(fault, FileNotFoundError) and "No usable temporary directory" in str(fault):
            _to_stderr("error: no folder takes temporary files; set TMPDIR to one that does")
            return EXIT_USER
        disk = as_disk_error(fault)
        if disk is None:
            raise
        _to_stderr(f"failed: {disk}")
        return EXIT_FAILED


def _to_stderr(line: str) -> None:
    say(line, sys.stderr)
