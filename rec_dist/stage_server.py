"""The process that `rec-dist run` forks its stages from: it loads the libraries once, and each stage has a process of its own.

    python -P -m rec_dist.stage_server FD PRELOAD

FD is a socket of commands/stages.py, the only one to start this. A message there is JSON: first null goes out, when stages can
begin; then the words of a stage come in, and its process id and its exit code go out (negative: the signal that ended it).
Nothing passes from stage to stage: this process computes nothing. PRELOAD is 0 on a machine with a GPU, since a process that was
forked after CUDA was asked for cannot use it; a stage then loads its libraries itself. Cost: the memory of the libraries, most
of which the stages share.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from rec_dist.cli import main
from rec_dist.runtime.quiet import quieten

_PRELOAD = (
    "rec_dist.commands.prepare",
    "rec_dist.commands.train",
    "rec_dist.commands.evaluate",
    "rec_dist.training.worker",
    "rec_dist.methods.language_model.ranking",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "peft",
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # they are for the stage


def serve(commander: Connection, *, preload: bool) -> int:
    """Runs stages until the commander is gone. Returns 0, or in the process of a stage its exit code."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if preload:
        _load()
    for words in _requests(commander):
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a stage must not lose one before its own handlers stand
        child = os.fork()
        if not child:
            commander.close()
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            sys.argv = [str(Path(__file__).with_name("__main__.py")), *words]  # as `python -m rec_dist` has it
            return main(words)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        _tell(commander, child)
        _tell(commander, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return 0


def _load() -> None:
    from rec_dist.engine.lean_import import import_deepspeed

    quieten()
    import_deepspeed()
    for name in _PRELOAD:
        import_module(name)
    gc.freeze()  # collections in a stage leave these pages shared


def _requests(commander: Connection) -> Iterator[list[str]]:
    _tell(commander, None)
    while True:
        try:
            yield json.loads(commander.recv_bytes())
        except (EOFError, ConnectionError):
            return


def _tell(commander: Connection, value: int | None) -> None:
    with suppress(ConnectionError):  # the commander is gone, which the next request shows
        commander.send_bytes(json.dumps(value).encode())


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)
    sys.exit(serve(Connection(int(sys.argv[1])), preload=sys.argv[2] == "1"))
