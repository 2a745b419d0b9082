"""Runs one method in a process of its own. Reads JSON lines (build a point, run a step), answers seconds, loss and peak memory.

Memory of a step: the process's high-water mark of resident memory (VmHWM, reset before the step through /proc/self/clear_refs)
minus its resident memory (VmRSS) just before the step, after freed heap was returned. This leaves the model itself out.
"""

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peer_targets import Point

OURS = ("d", "e", "e-apart")


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 if there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def settle() -> None:
    """Returns freed memory to the system and resets the high-water mark."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Worker:
    """Holds the model and the current point."""

    def __init__(self, method: str, shape: Any, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.method, self.shape = method, shape
        self.model: Any = None
        self.runner: Any = None

    def build(self, point: Point) -> dict[str, Any]:
        from benchmarks.peer_methods import build, build_model
        from benchmarks.peer_trl import VARIANTS, TRLMethod

        self.runner = None
        # Build a fresh model for each point: the scorer and TRL change the model they are given.
        self.model = None
        settle()
        self.model = build_model(self.shape, attention="auto" if self.method in OURS else "sdpa")
        if self.method in VARIANTS:
            self.runner = TRLMethod(self.model, point, self.shape.vocab, self.method)
        else:
            self.runner = build(self.method, self.model, point, self.shape.vocab)
        settle()
        return {"tokens": self.runner.num_tokens, "groups": self.runner.groups}

    def step(self) -> dict[str, Any]:
        self.model.zero_grad(set_to_none=True)
        settle()
        before = resident("VmRSS")
        start, busy = time.perf_counter(), time.process_time()
        loss = self.runner.step()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        peak = max(0, resident("VmHWM") - before)
        settle()  # the other methods' processes need the memory
        return {"seconds": seconds, "cpu_seconds": busy, "loss": loss, "peak_bytes": peak}


def main() -> None:
    """argv: method, shape as JSON, threads. Only answers go to stdout; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from benchmarks.peer_methods import Shape

    worker = Worker(sys.argv[1], Shape(**json.loads(sys.argv[2])), int(sys.argv[3]))
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = worker.build(Point(**order["build"])) if "build" in order else worker.step()
        except Exception as fault:
            answer = {"error": f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
