"""Runs the stages of a pipeline one after another, each in a process of its own, forked from one that has loaded the libraries.

Imports take 3 to 6 CPU seconds, which each of a dozen stages would pay. A stage is what `rec-dist WORDS` is on a command line:
its memory is freed with its process, a fault ends it alone, and its exit code, messages and signals are its own.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from rec_dist.errors import WorkerFailedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stages:
    """The server of a pipeline's stages (rec_dist/stage_server.py). Use it in `stages_forked()`.

    stop_wanted: whether a SIGTERM came during a stage, which may have ended well all the same.
    """

    def __init__(self, server: Connection) -> None:
        self._server, self.stop_wanted = server, False

    def run(self, words: list[str]) -> int:
        """Runs `rec-dist WORDS` and returns its exit code; negative: the signal that ended it.

        Passes SIGTERM on, so that the stage can save before it stops. Raises WorkerFailedError if the server was killed; the stage,
        which nobody waits for any more, then gets a SIGTERM too.
        """
        # On a terminal, Ctrl-C reaches the stage directly.
        child: int | None = None
        early: list[int] = []

        def pass_on(number: int, _: object) -> None:
            self.stop_wanted = True
            if child is None:
                early.append(number)
            else:
                _kill(child, number)

        previous = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        }
        try:
            self._server.send_bytes(json.dumps(words).encode())
            child = int(self.answer())
            for number in early:
                _kill(child, number)
            return int(self.answer())
        except (EOFError, ConnectionError) as fault:
            if child is not None:
                _kill(child, signal.SIGTERM)
            raise WorkerFailedError(
                "the process that stages are forked from was killed; wait until its stage has stopped, too, and run the same command "
                "again"
            ) from fault
        finally:
            for number, old in previous.items():
                signal.signal(number, old)

    def answer(self) -> int:
        """The next message of the server; 0 for the first, which has no number."""
        value: int | None = json.loads(self._server.recv_bytes())
        return value or 0


def _kill(process: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(process, number)


@contextmanager
def stages_forked(*, preload: bool) -> Iterator[Stages]:
    """Inside, stages can run. preload: load the libraries of all stages first, in some 6 CPU seconds; not with a GPU."""
    here, there = Pipe()
    with here:
        server = _started(there, preload)
        try:
            stages = Stages(here)
            stages.answer()
        except BaseException as fault:
            server.kill()
            server.wait()
            if not isinstance(fault, EOFError | ConnectionError):
                raise
            raise WorkerFailedError("the process that stages are forked from did not start; its message stands above") from fault
        try:
            yield stages
        finally:
            here.close()  # at which the server ends
            server.wait()


def _started(there: Connection, preload: bool) -> subprocess.Popen[bytes]:
    """The server, which has the only copy of `there`."""
    # -P: the current folder may hold an argparse.py of its own, which `python -m` would import in place of Python's.
    command = [sys.executable, "-P", "-m", "rec_dist.stage_server", str(there.fileno()), str(int(preload))]
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the server unblocks them when it ignores them
    try:
        with there:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[there.fileno()])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
