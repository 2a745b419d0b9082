"""Real processes for tests: workers of one gloo group, and the command line, each in a process of its own that can be killed.

They are forked from a server that has loaded the libraries: each takes 0.1 s instead of 8 s, and nothing passes from run to
run.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 180.0  # more than any of these takes on a busy machine; a hang fails instead of lasting forever
_PRELOAD = [
    "rec_dist.commands.evaluate",
    "rec_dist.commands.train",
    "deepspeed",
    "peft",
    "transformers.models.llama.modeling_llama",
]


class WorkerFailedError(Exception):
    """A worker raised. Its traceback is the message; `kind` is the name of the exception."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass
class Child:
    """A process with its standard output and error in files."""

    process: BaseProcess
    folder: Path

    @property
    def out(self) -> str:
        """Standard output so far."""
        return (self.folder / "out").read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        """Standard error so far."""
        return (self.folder / "err").read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """The exit code; -9 for a killed process."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"no end after {seconds} s; standard error: {self.err[-3000:]}")
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL: no clean-up, as when a node dies."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def start(function: Any, *arguments: Any, folder: Path, environment: dict[str, str] | None = None) -> Child:
    """Runs function(*arguments) in a process of its own, whose exit code is the returned number, if it is one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("out", "err"):
        (folder / name).write_bytes(b"")
    process = context.Process(target=_main, args=(function, arguments, folder, environment or {}), daemon=True)
    process.start()
    return Child(process, folder)


def _main(function: Any, arguments: Sequence[Any], folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    multiprocessing.current_process().daemon = False  # it ends with the tests' process, and may have children all the same
    # Tests that a shell runs in the background inherit that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(folder / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
    result = function(*arguments)
    sys.exit(result if isinstance(result, int) else 0)


def start_command(folder: Path, *words: object) -> Child:
    """Starts `rec-dist WORDS`; its outputs go to `folder`."""
    from rec_dist.cli import main

    return start(main, [str(word) for word in words], folder=folder)


def run_command(folder: Path, *words: object) -> tuple[int, Child]:
    """Runs `rec-dist WORDS` to its end: its exit code and its outputs."""
    child = start_command(folder, *words)
    return child.wait(), child


def run_workers(worker: Any, jobs: Sequence[Any], folder: Path) -> list[Any]:
    """Runs worker(World, job) in one process a job, all in one gloo group. Returns what each returned.

    Raises WorkerFailedError if one raised.
    """
    children = start_workers(worker, jobs, folder)
    for child in children:
        child.wait()
    results = [child.folder / "result.json" for child in children]
    values = [json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None for path in results]
    for value, child in zip(values, children, strict=True):
        if value is None:
            raise WorkerFailedError("exit", f"exit code {child.process.exitcode}: {child.err[-3000:]}")
        if "raised" in value:
            raise WorkerFailedError(value["raised"], value["traceback"])
    return [value["returned"] for value in values]


def start_workers(worker: Any, jobs: Sequence[Any], folder: Path) -> list[Child]:
    """Does what run_workers does, but does not wait: returns one child a rank."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    folders = [folder / f"rank-{rank}-{time.time_ns()}" for rank in range(len(jobs))]
    return [
        start(_work, worker, rank, len(jobs), job, folders[rank], folder=folders[rank], environment=address)
        for rank, job in enumerate(jobs)
    ]


def _work(worker: Any, rank: int, size: int, job: Any, folder: Path) -> int:
    from rec_dist.runtime.quiet import quieten
    from rec_dist.runtime.world import World

    quieten()
    try:
        value = {"returned": worker(World(rank, size, rank, "cpu"), job)}
    except Exception as fault:
        value = {"raised": type(fault).__name__, "traceback": traceback.format_exc()}
    (folder / "result.json").write_text(json.dumps(value), encoding="utf-8")
    return int("raised" in value)


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
