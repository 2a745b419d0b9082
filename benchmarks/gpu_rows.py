"""Rows of the GPU suite: each runs within a time limit, is guarded and timed, and is handed on as soon as it is there.

A measurement that fails leaves the reason in its row, and the next one runs. `write` gets all rows after each new one, so a run
that is killed keeps what it has measured.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks import results
from benchmarks.peer_worker import resident, settle

Row = dict[str, Any]
Value = TypeVar("Value")
MEASURED, FAILED, NOT_MEASURED, SKIPPED = "measured", "failed", "not measured", "skipped"
_WARM_UP = 2  # steps: the first compiles and allocates, the second may still meet a new length
_OWN = ("rec_dist", "rec_dist_kernels", "benchmarks")  # a module of ours that is missing is a fault, not a missing package


class NotMeasuredError(Exception):
    """A measurement that this machine cannot make. The text is the reason, which the row shows."""


@dataclass(frozen=True)
class Place:
    """device: as torch names it ("cpu", "cuda:0"). tiny: shapes that take seconds on a CPU and check the script, not the speed."""

    device: str
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which models train: bfloat16 on GPUs, float32 on CPUs."""
        return torch.bfloat16 if self.on_gpu else torch.float32


class Suite:
    """Runs rows one after another. repeats: timed steps of a row. write: called with all rows after each new one."""

    def __init__(
        self, place: Place, *, seconds: float, repeats: int = 5, write: Callable[[list[Row]], None] = lambda rows: None
    ) -> None:
        self.place = place
        self.repeats = repeats
        self.rows: list[Row] = []
        self._write = write
        self._section = ""
        self._deadline = time.perf_counter() + seconds

    def section(self, name: str, seconds: float, run: Callable[["Suite"], None]) -> None:
        """Runs the rows of a section, which has `seconds`. What goes wrong between rows becomes a row as well."""
        self._section, self._deadline = name, time.perf_counter() + seconds
        self.fresh()
        self.build({"method": "all"}, 0.0, lambda: run(self))

    def row(self, about: Row, expected_seconds: float, measure: Callable[[], Row]) -> Row:
        """Adds about | measure(), or about and the reason why there is no measurement."""
        status, found = self._guarded(expected_seconds, measure)
        return self._add({**about, **(found or {})}, status)

    def build(self, about: Row, expected_seconds: float, make: Callable[[], Value]) -> Value | None:
        """Returns make(), or None after a row with the reason."""
        status, made = self._guarded(expected_seconds, make)
        if status != MEASURED:
            self._add(about, status)
        return made

    def free(self) -> None:
        """Frees the memory that the last row left behind."""
        gc.collect()
        if self.place.on_gpu:
            with suppress(RuntimeError):  # after an illegal access every call to the GPU raises; the rows that follow say so
                torch.cuda.empty_cache()

    def fresh(self) -> None:
        """Also forgets what was compiled: after one shape, torch.compile would make a graph for any shape of the next."""
        if self.place.on_gpu:
            torch.compiler.reset()
        self.free()

    def time(self, step: Callable[[], Any], *, clear: Callable[[], None] = lambda: None) -> Row:
        """`timed` on this suite's device."""
        return timed(step, self.place.device, clear=clear, repeats=self.repeats)

    def _guarded(self, expected_seconds: float, make: Callable[[], Value]) -> tuple[str, Value | None]:
        left = self._deadline - time.perf_counter()
        if left < expected_seconds:
            return f"{SKIPPED}: needs about {expected_seconds:.0f} s, {max(left, 0):.0f} s left", None
        try:
            return MEASURED, make()
        except NotMeasuredError as fault:
            return f"{NOT_MEASURED}: {fault}", None
        except Exception as fault:
            if isinstance(fault, ModuleNotFoundError) and (fault.name or "").partition(".")[0] not in _OWN:
                return f"{NOT_MEASURED}: {fault}", None
            lines = str(fault).strip().splitlines()
            return f"{FAILED}: {type(fault).__name__}: {lines[0][:160] if lines else ''}", None

    def _add(self, row: Row, status: str) -> Row:
        kind = {"tiny": True} if self.place.tiny else {}
        row = {"section": self._section, **row, "device": self.place.device, **kind, "status": status}
        self.rows.append(row)
        self._write(self.rows)
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.free()
        return row


def timed(step: Callable[[], Any], device: str, *, clear: Callable[[], None] = lambda: None, repeats: int) -> Row:
    """Milliseconds of a step after two warm-up steps, bytes held before them, and the peak above these (None on a CPU)."""
    on_gpu = device.startswith("cuda")
    clear()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if on_gpu else None
    samples = []
    for number in range(repeats + _WARM_UP):
        clear()
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        if number >= _WARM_UP:
            samples.append((time.perf_counter() - start) * 1e3)
    peak = None if held is None else torch.cuda.max_memory_allocated() - held
    clear()
    return {"milliseconds": results.spread(samples), "held_bytes": held, "peak_bytes": peak}


def bytes_in_use(device: str) -> int:
    """Bytes in use now: of torch's allocator on a GPU, resident pages of this process on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return int(torch.cuda.memory_allocated())
    settle()
    return resident("VmRSS")


def peak_during(step: Callable[[], Any], device: str) -> int:
    """The most bytes in use while step() runs, those held before it included."""
    on_gpu = device.startswith("cuda")
    bytes_in_use(device)  # waits for what is still running, and resets the high-water mark of a CPU
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) if on_gpu else resident("VmHWM")
